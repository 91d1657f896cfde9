"""Token budgets and the ledger of requests."""

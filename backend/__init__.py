"""The course platform: accounts, courses, keys, budgets, conversations and the public /v1 door."""

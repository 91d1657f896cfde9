"""Course documents: upload, the job table, the index worker, search."""

"""What the node remembers: the job ledger (a database) and the spool (folders with whole files only)."""

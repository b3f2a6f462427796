"""KV bookkeeping: block hashes, block pool with prefix cache, ledger of holders. Pure: no I/O, no torch."""

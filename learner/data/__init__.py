"""What an update is made of: the experience buffer, its ledger, batches and texts."""

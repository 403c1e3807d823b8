"""What happened, in an order that cannot be changed unnoticed. Pure: entries in, verdicts out."""

from luminaguard.ledger.chain import Checkpoint, Entry, next_entry, sign_checkpoint, verify_chain, verify_checkpoint

__all__ = ["Checkpoint", "Entry", "next_entry", "sign_checkpoint", "verify_chain", "verify_checkpoint"]

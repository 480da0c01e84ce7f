"""The audit trail: who changed what, when and from where, in a chain that shows any tampering."""

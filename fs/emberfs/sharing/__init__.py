"""An embedded store that many processes share: who owns it, and how the others reach it.

See docs/decisions/0010-sharing.md. Start with `finding`.
"""

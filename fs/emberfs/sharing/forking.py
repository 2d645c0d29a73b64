"""What a fork of this process must not come between: open files that the child would have without knowing of them.

A lock that the child keeps is never free, and who reads from a pipe that it keeps sees no end.
"""

from __future__ import annotations

import os
import threading

no_fork = threading.Lock()
"""Held for a moment, while files are opened or closed and that is written down; never while another lock is taken."""

os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=no_fork.release)

"""A stand-in for Firecracker and its jailer, for tests on machines whose KVM runs no guest.

It is a test double: no machine, no isolation. It is strict where the real program is (what may be asked
in which phase, which fields a request may have, what a vsock connection has to send, which files have to
be there), so that the backend's half of each conversation is tested; what only the real program can show
is in the tests marked ``firecracker``. Nothing outside of ``luminaguard.testing`` refers to it.

Facts that it follows: Firecracker's API description 1.16.1 (``api.json`` keeps its names, types and
ranges), docs/vsock.md, docs/jailer.md, and the error texts of its sources.
"""

from luminaguard.testing.firecracker.programs import install

__all__ = ["install"]

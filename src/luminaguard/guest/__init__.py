"""What runs inside the micro-VM: the supervisor (PID 1) and the protocol that it speaks.

Standard library only; imports nothing of the rest of LuminaGuard. The host shares the frame codec
with it (:mod:`luminaguard.guest.frames`) and trusts nothing else: on the host's side every byte
from here is an attack.
"""

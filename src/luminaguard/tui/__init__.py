"""The terminal interface of the Approval Cliff: an inbox, the card of a request, and its answers.

It draws what :mod:`luminaguard.effects` makes of an effect and hands answers to
:mod:`luminaguard.runtime.decisions`; it decides nothing itself. Everything that came from a machine is
escaped before it gets here, and what is not looked at is not loaded.
"""

"""What the agent wants, and how risky it is: actions, and the ordered rules that judge them.

Pure: no I/O, no clock, no random numbers. The time of a judgement is an argument, and files of rules
arrive as text.
"""

from luminaguard.actions.model import Action, EffectKind, FileFact, Hints, Risk, Severity
from luminaguard.actions.policy import Judgement, Policy, Step

__all__ = ["Action", "EffectKind", "FileFact", "Hints", "Judgement", "Policy", "Risk", "Severity", "Step"]

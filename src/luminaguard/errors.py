"""The one tree of errors.

Every error says what happened (the message), what was kept (``kept``) and what to do next
(``hint``), and knows the exit status that the command line ends with. Code below the command line
raises; only the command line exits.

    LuminaGuardError                     125  something inside failed
    ├── SettingsError                    123  a settings file or variable cannot be used
    │   └── PolicyInvalid                     a file of rules cannot be used: nothing runs
    ├── ActionInvalid                    122  what was given is not an action
    ├── Unavailable                      123  a part that is needed is not there, or not usable
    │   ├── HypervisorUnavailable             no usable QEMU
    │   ├── JailUnavailable                   this host does not allow the jail around QEMU
    │   ├── ImageMissing                      no guest image was built yet
    │   ├── ModelUnavailable                  no language model is set up, or it does not answer
    │   └── PackageUnavailable                a locked package cannot be had from apt
    │       └── LockOutdated                  the sources offer other versions
    ├── ImageError                       123  a guest image cannot be built or used
    │   ├── ImageTampered                     a part differs from its manifest
    │   └── ImageBuildFailed
    ├── MachineError                     125  a micro-VM failed
    │   ├── MachineNotFound              122  there is none of that name
    │   ├── CommandTooLong               122  it does not fit into one call
    │   ├── BootFailed
    │   ├── GuestProtocolError                the guest broke the protocol: its VM was destroyed
    │   └── GuestUnresponsive                 the guest did not answer in time: same
    ├── WorkspaceError                   122  the folder cannot be used as a workspace
    │   └── WorkspaceChanged                  it changed while it was read
    ├── ChangesetRefused                 122  what the guest reported may not be published
    ├── ApprovalError                    122  a request cannot be decided, or a decision not used
    │   ├── Forbidden                         a rule does not let it be asked for
    │   │   └── TaskStopped                   a person stopped the task that it belongs to
    │   ├── ApprovalNeeded           120      it may not even be rehearsed before a person said so
    │   ├── PolicyChanged                     other rules hold than when it was shown
    │   └── RequestNotFound
    ├── PublishError                     122  nothing was published
    │   ├── Conflict                          the host's files are not the base any more
    │   └── OutcomeUnknown                    recovery could not restore the state before
    ├── TaskError                        122  a task cannot do what was asked of it
    │   ├── TaskBusy                          another process works on it
    │   ├── LeaseLost                         of a worker: others do its work by now
    │   └── TaskNotFound
    ├── ModelRefused                     122  a language model will not answer this
    │   └── HistoryTooLong                    it does not take so much at once
    ├── McpServerFailed                  122  a server of tools failed; the call may have been executed
    │   ├── NotExecuted                       a call was refused, or never sent
    │   ├── MaybeExecuted                     a call was sent, and nobody knows what became of it
    │   ├── SessionLost                       the server knows the session no more; it was not called
    │   └── ToolQuarantined                   a tool is not what a person accepted; it was not called
    ├── StorageError                     125  the database or a state file cannot be used
    │   └── DatabaseUnreachable               its server does not answer, for now
    └── LedgerError                      122  the ledger does not verify
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "EXIT_DENIED",
    "EXIT_INTERNAL",
    "EXIT_PENDING",
    "EXIT_REFUSED",
    "EXIT_TIMEOUT",
    "EXIT_UNAVAILABLE",
    "ActionInvalid",
    "ApprovalError",
    "ApprovalNeeded",
    "BootFailed",
    "ChangesetRefused",
    "CommandTooLong",
    "Conflict",
    "DatabaseUnreachable",
    "Forbidden",
    "GuestProtocolError",
    "GuestUnresponsive",
    "HistoryTooLong",
    "HypervisorUnavailable",
    "ImageBuildFailed",
    "ImageError",
    "ImageMissing",
    "ImageTampered",
    "JailUnavailable",
    "LeaseLost",
    "LedgerError",
    "LockOutdated",
    "LuminaGuardError",
    "MachineError",
    "MachineNotFound",
    "MaybeExecuted",
    "McpServerFailed",
    "ModelRefused",
    "ModelUnavailable",
    "OutcomeUnknown",
    "PackageUnavailable",
    "PolicyChanged",
    "PolicyInvalid",
    "PublishError",
    "RequestNotFound",
    "SettingsError",
    "StorageError",
    "TaskBusy",
    "TaskError",
    "TaskNotFound",
    "TaskStopped",
    "ToolQuarantined",
    "Unavailable",
    "WorkspaceChanged",
    "WorkspaceError",
    "first_of",
]

EXIT_PENDING = 120
EXIT_DENIED = 121
EXIT_REFUSED = 122
EXIT_UNAVAILABLE = 123
EXIT_TIMEOUT = 124
EXIT_INTERNAL = 125


class LuminaGuardError(Exception):
    """The root: something went wrong that a person can do something about.

    Args:
        message: what happened, in one sentence.
        hint: what to do about it.
        kept: what was kept, or that nothing was lost.
    """

    exit_code: ClassVar[int] = EXIT_INTERNAL

    def __init__(self, message: str, *, hint: str, kept: str = "Nothing was changed.") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.kept = kept


class SettingsError(LuminaGuardError):
    """A settings file or an environment variable cannot be used."""

    exit_code = EXIT_UNAVAILABLE


class PolicyInvalid(SettingsError):
    """A file of rules cannot be used; it says where and why."""


class ActionInvalid(LuminaGuardError):
    """What was given to be judged is not an action."""

    exit_code = EXIT_REFUSED


class Unavailable(LuminaGuardError):
    """A part that this action needs is missing or unusable; nothing weaker is used instead."""

    exit_code = EXIT_UNAVAILABLE


class HypervisorUnavailable(Unavailable):
    """No usable hypervisor was found."""


class JailUnavailable(Unavailable):
    """This host does not allow a layer of the jail around the hypervisor."""


class ImageMissing(Unavailable):
    """No guest image was built yet."""


class ModelUnavailable(Unavailable):
    """No language model is set up, or it cannot be reached, or refuses for a while.

    ``requests`` is how often it was asked.
    """

    requests = 0


class PackageUnavailable(Unavailable):
    """A package of the guest image cannot be had from the sources of this machine."""


class LockOutdated(PackageUnavailable):
    """The package sources do not offer the locked versions any more."""


class ImageError(LuminaGuardError):
    """A guest image cannot be built or used."""

    exit_code = EXIT_UNAVAILABLE


class ImageTampered(ImageError):
    """A part of an image or template differs from its manifest."""


class ImageBuildFailed(ImageError):
    """An image could not be built."""


class MachineError(LuminaGuardError):
    """A micro-VM failed; it has been destroyed."""


class MachineNotFound(MachineError):
    """There is no machine of that name."""

    exit_code = EXIT_REFUSED


class CommandTooLong(MachineError):
    """A command line and its environment do not fit into one call."""

    exit_code = EXIT_REFUSED


class BootFailed(MachineError):
    """A micro-VM did not come up."""


class GuestProtocolError(MachineError):
    """The guest sent something that the protocol does not allow."""


class GuestUnresponsive(MachineError):
    """The guest did not answer within its time."""


class WorkspaceError(LuminaGuardError):
    """The folder cannot be used as a workspace."""

    exit_code = EXIT_REFUSED


class WorkspaceChanged(WorkspaceError):
    """The folder changed while it was being read."""


class ChangesetRefused(LuminaGuardError):
    """The changes that the guest reported may not be published."""

    exit_code = EXIT_REFUSED


class ApprovalError(LuminaGuardError):
    """A request cannot be decided, or a decision cannot be used."""

    exit_code = EXIT_REFUSED


class Forbidden(ApprovalError):
    """A rule forbids it: nobody is asked."""


class TaskStopped(Forbidden):
    """A person stopped the task: nothing more is asked, approved or done for it."""

    def __init__(self, task: str, why: str, *, kept: str = "Nothing was changed.") -> None:
        super().__init__(
            f"Task {task!a} was stopped by a person{f': {ascii(why)[1:-1]}' if why else ''}.",
            hint="Begin another task, if that is what they want.",
            kept=kept,
        )


class ApprovalNeeded(ApprovalError):
    """Something waits for a person's answer before it is even rehearsed; ``request_id`` names it."""

    exit_code = EXIT_PENDING

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"A rule wants a person's answer before this runs: {request_id} waits.",
            hint=f"Decide with 'luminaguard approvals approve {request_id}', then run it again.",
            kept="Nothing ran.",
        )
        self.request_id = request_id


class PolicyChanged(ApprovalError):
    """The rules changed since a request was shown: it must be looked at again."""


class RequestNotFound(ApprovalError):
    """There is no request with this id."""


class PublishError(LuminaGuardError):
    """Publishing was refused or failed; the folder is as it was before."""

    exit_code = EXIT_REFUSED


class Conflict(PublishError):
    """The host's files are not the ones that the card was made from."""


class OutcomeUnknown(PublishError):
    """An interrupted publish could not be undone completely."""


class TaskError(LuminaGuardError):
    """A task cannot do what was asked of it."""

    exit_code = EXIT_REFUSED


class TaskBusy(TaskError):
    """Another process works on the task."""


class LeaseLost(TaskError):
    """This host did not renew its lease in time; what it was at is done by others."""


class TaskNotFound(TaskError):
    """There is no task of this id."""


class ModelRefused(LuminaGuardError):
    """A language model will not answer this, however often it is asked; ``requests`` is how often it was."""

    exit_code = EXIT_REFUSED
    requests = 0


class HistoryTooLong(ModelRefused):
    """A language model does not take so much at once."""


class StorageError(LuminaGuardError):
    """The database or a state file cannot be used."""


class McpServerFailed(LuminaGuardError):
    """An MCP server crashed, hung, or said what cannot be; a call that it was at may have been executed."""

    exit_code = EXIT_REFUSED


class NotExecuted(McpServerFailed):
    """A server refused a call, or never got it."""

    def __init__(self, message: str, *, hint: str, kept: str = "It was not executed.") -> None:
        super().__init__(message, hint=hint, kept=kept)


class MaybeExecuted(McpServerFailed):
    """A call was sent and no answer came: it may have been executed, and is not repeated."""


class SessionLost(McpServerFailed):
    """What a server knew of a session is gone; the call that met that was not executed."""


class ToolQuarantined(McpServerFailed):
    """A tool is not what a person accepted."""


def first_of(error: BaseException) -> BaseException:
    """What a person is told of a group of groups: an interruption before what it brought about, else the first."""
    while isinstance(error, BaseExceptionGroup):
        _, ends = error.split(Exception)
        error = (ends or error).exceptions[0]
    return error


class DatabaseUnreachable(StorageError):
    """The database's server does not answer, for now."""


class LedgerError(LuminaGuardError):
    """The ledger does not verify."""

    exit_code = EXIT_REFUSED

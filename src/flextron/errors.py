"""Errors that a caller may want to catch.

FlextronError
├── UnknownFamilyError    no spec for this architecture; a spec of some ten lines adds it
├── CheckpointError       a folder or file that is missing, truncated or of another kind
├── SubnetError           widths that the model or its search space does not have (also a ValueError)
├── TooLittleTextError    a text shorter than one block
├── CostError             a cost table that is missing, damaged, or of another device or model
├── BudgetError           a budget that cannot be read or met (also a ValueError)
├── RouterError           a router or surrogate that is missing, inaccurate, or of another checkpoint
├── TrainingError         a loss that is no longer a number
└── ExportError           a sub-network that the target format cannot express
"""


class FlextronError(Exception):
    """Base of all errors that flextron raises for a caller to catch; the command line prints it without a traceback."""


class UnknownFamilyError(FlextronError):
    """The architecture has no `Family` spec."""


class CheckpointError(FlextronError):
    """A checkpoint that is missing, incomplete, or not what it should be."""


class SubnetError(FlextronError, ValueError):
    """A `Subnet` that does not fit the model or its search space."""


class TooLittleTextError(FlextronError):
    """A text that holds less than one block of tokens."""


class CostError(FlextronError):
    """A cost table that is missing, damaged, or of another device or model."""


class BudgetError(FlextronError, ValueError):
    """A budget that cannot be read, or that no sub-network meets."""


class RouterError(FlextronError):
    """A router or surrogate that is missing, too inaccurate, or made for another checkpoint."""


class TrainingError(FlextronError):
    """A training run that cannot go on, such as one whose loss is no longer a number."""


class ExportError(FlextronError):
    """A sub-network that cannot be exported to the format asked for."""

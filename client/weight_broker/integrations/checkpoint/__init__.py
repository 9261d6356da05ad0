"""The identity of a checkpoint directory: which files a loader reads, the model's name, and a digest of the content."""

from weight_broker.integrations.checkpoint.damage import DamageCheck
from weight_broker.integrations.checkpoint.digest import checkpoint_digest
from weight_broker.integrations.checkpoint.files import checkpoint_files
from weight_broker.integrations.checkpoint.header import CheckpointError, CheckpointTensor, checkpoint_tensors
from weight_broker.integrations.checkpoint.name import checkpoint_name
from weight_broker.integrations.checkpoint.names import CoveredWeights, unlike_model
from weight_broker.integrations.checkpoint.path import utf8_path

__all__ = [
    "CheckpointError",
    "CheckpointTensor",
    "CoveredWeights",
    "DamageCheck",
    "checkpoint_digest",
    "checkpoint_files",
    "checkpoint_name",
    "checkpoint_tensors",
    "unlike_model",
    "utf8_path",
]

"""Settings: each is defined once, in a frozen record, with default, type, unit and help.

The command line and Python build the same records, so both report the same errors.
"""

from spinal_jax.config.audit import AuditConfig
from spinal_jax.config.compare import AssertConfig, CompareConfig, ScoreConfig
from spinal_jax.config.data import CorpusConfig, PreferencesConfig, PromptsConfig
from spinal_jax.config.files import ConvertConfig, ExportConfig, VerifyConfig
from spinal_jax.config.metrics import ContractionConfig, MetricsConfig, TransportConfig, VariantsConfig
from spinal_jax.config.model import ComparedConfig, ModelConfig, SourceConfig
from spinal_jax.config.parallel import AuditParallelConfig, ParallelConfig, ProcessesConfig
from spinal_jax.config.record import about, build, merged, require, to_mapping

__all__ = [
    "AssertConfig",
    "AuditConfig",
    "AuditParallelConfig",
    "CompareConfig",
    "ComparedConfig",
    "ContractionConfig",
    "ConvertConfig",
    "CorpusConfig",
    "ExportConfig",
    "MetricsConfig",
    "ModelConfig",
    "ParallelConfig",
    "PreferencesConfig",
    "ProcessesConfig",
    "PromptsConfig",
    "ScoreConfig",
    "SourceConfig",
    "TransportConfig",
    "VariantsConfig",
    "VerifyConfig",
    "about",
    "build",
    "merged",
    "require",
    "to_mapping",
]

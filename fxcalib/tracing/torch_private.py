"""The private torch API that tracing stands on: nothing else in the package imports it.

Written against torch 2.13, kept working from 2.11 on. The tests run on the oldest and the newest torch of our range.
"""

from __future__ import annotations

import torch._dynamo  # noqa: F401  (must be imported before any mode is entered)
import torch._functorch.apis as functorch_apis
import torch._functorch.config as functorch_config
import torch._functorch.vmap as functorch_vmap
import torch.fx.experimental._config as fx_config
import torch.utils._pytree as pytree
from torch._C import _DisablePythonDispatcher as DisablePythonDispatcher
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_autocast_cache,
    disable_proxy_modes_tracing,
    fetch_sym_proxy,
    get_proxy_slot,
    py_sym_types,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.multiprocessing.reductions import StorageWeakRef

patch_functorch_config = functorch_config.patch
patch_fx_config = fx_config.patch  # type: ignore[attr-defined]

__all__ = [
    "ConstantSource",
    "DataDependentOutputException",
    "DimDynamic",
    "DisablePythonDispatcher",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "ProxyTorchDispatchMode",
    "PythonKeyTracer",
    "ShapeEnv",
    "StatelessSymbolicContext",
    "StorageWeakRef",
    "UnsupportedOperatorException",
    "disable_autocast_cache",
    "disable_proxy_modes_tracing",
    "enable_python_dispatcher",
    "fetch_sym_proxy",
    "free_unbacked_symbols",
    "functorch_apis",
    "functorch_vmap",
    "get_proxy_slot",
    "patch_functorch_config",
    "patch_fx_config",
    "py_sym_types",
    "pytree",
    "track_tensor_tree",
    "unset_fake_temporarily",
]

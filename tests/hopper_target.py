"""A Hopper GPU that is not here, for which programs are lowered and compiled."""

import re

import jax
import numpy as np
import pytest

H200 = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
CONFIGURATION = """
    gpu_device_info {
      cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150754820096
    }
    platform_name: "CUDA"
    dnn_version_info { major: 9 minor: 1 }
    runtime_version { major: 12 minor: 9 }
    device_description_str: "NVIDIA H200"
"""


def lowered(run, *shapes, mesh=((), ())):
    """The program for CUDA, on a mesh of axes of these (sizes, names)."""
    automatic = (jax.sharding.AxisType.Auto,) * len(mesh[0])
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(*mesh, automatic, abstract_device=H200)):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def ahead_of_time():
    """The sharding of operands with which programs are compiled for sm_90a; skips the test where that is impossible."""
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for GPUs needs jax-cuda12-plugin[with-cuda]")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc("one", "cuda", topology="1x1x1", target_config=CONFIGURATION)
    except NotImplementedError:
        pytest.skip("without a GPU its plugin answers only under JAX_PLATFORMS=cpu")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check_registers(report):
    """Checks the report of ptxas under `MOSAIC_GPU_DUMP_PTXAS`: no spills, no products that wait for each other."""
    report = report.out + report.err
    assert re.search(r"Used \d+ registers", report)
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "serialized" not in report

# SPDX-License-Identifier: Apache-2.0
"""Free memory, within the limits of a container."""

import pytest

from meshwen.runtime import memory


def test_a_control_groups_limit_is_kept(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    group = root / "pod" / "container"
    group.mkdir(parents=True)
    own.write_text("4:memory:/other\n0::/pod/container\n")
    files = {"active_file": 100, "inactive_file": 50, "anon": 7}
    for folder, limit, used in ((group, "max", 600), (group.parent, "1000", 600)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in files.items()))
    assert list(memory._free_bytes_of_cgroups(own, root)) == [550]
    assert list(memory._free_bytes_of_cgroups(tmp_path / "none", root)) == []


@pytest.mark.parametrize("path", ["/docker/a", "/seen/by/the/host/alone"])
def test_a_limit_of_cgroup_v1_is_kept(tmp_path, path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(f"5:cpu,cpuacct:/\n4:hugetlb,memory:{path}\n1:name=systemd:/\n0::/none\n")
    stat = "active_file 1\ninactive_file 2\ntotal_active_file 100\ntotal_inactive_file 50\n"
    unlimited = 0x7FFFFFFFFFFFF000
    for folder, limit in ((root / "memory", 1000), (root / "memory/docker/a", unlimited)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("600\n")
        (folder / "memory.stat").write_text(stat)
    assert min(memory._free_bytes_of_cgroups(own, root)) == 550

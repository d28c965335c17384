# SPDX-License-Identifier: Apache-2.0
"""The build of the kernels, and their way into wheels, by a compiler that notes its arguments."""

import importlib
import json
import platform
import re
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMPILER = """
import json, pathlib, sys, time
arguments = sys.argv[1:]
with open({log!r}, "a", encoding="utf-8") as log:
    log.write(json.dumps(arguments) + "\\n")
if any(one.endswith({broken!r}) for one in arguments):
    sys.exit("int8.c:7:1: error: unknown type name 'flaot'")
if any(one.endswith({hangs!r}) for one in arguments):
    time.sleep(60)
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("a library")
"""


@pytest.fixture
def script(monkeypatch):
    """scripts/build_kernels.py, on a machine that names no target."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("MESHWEN_TARGET", "MESHWEN_CC"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("build_kernels")


@pytest.fixture
def fake(script, tmp_path):
    """Makes a compiler that writes no code; and reads what it was asked."""

    class Fake:
        log = tmp_path / "log"

        def compiler(self, broken="nothing", hangs="nothing", pinned=True):
            path = tmp_path / f"{broken}-{hangs}.py"
            text = COMPILER.format(log=str(self.log), broken=broken, hangs=hangs)
            path.write_text(text, encoding="utf-8")
            return script.Compiler((sys.executable, str(path)), pinned)

        def asked(self):
            return [json.loads(line) for line in self.log.read_text().splitlines()]

    return Fake()


def on(monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("system", "machine", "name"),
    [
        ("Linux", "x86_64", "linux-x86_64"),
        ("Linux", "aarch64", "linux-aarch64"),
        ("Darwin", "arm64", "macos-arm64"),
        ("Windows", "AMD64", "windows-x86_64"),
        ("Windows", "ARM64", None),
        ("Darwin", "x86_64", None),
        ("Linux", "riscv64", None),
    ],
)
def test_each_machine_has_its_target_or_none(script, monkeypatch, system, machine, name):
    on(monkeypatch, system, machine)
    if name:
        assert script.chosen() == name
    else:
        with pytest.raises(
            script.NoKernelsError, match=f"there are none for {system} on {machine}"
        ):
            script.chosen()


def test_a_target_can_be_named(script, monkeypatch):
    for name in script.TARGETS:
        monkeypatch.setenv("MESHWEN_TARGET", name)
        assert script.chosen() == name
    monkeypatch.setenv("MESHWEN_TARGET", "none")
    with pytest.raises(script.NoKernelsError, match="MESHWEN_TARGET=none"):
        script.chosen()


def test_an_unknown_target_is_refused_in_a_line(script, monkeypatch):
    monkeypatch.setenv("MESHWEN_TARGET", "amiga")
    with pytest.raises(SystemExit) as refused:
        script.chosen()
    assert str(refused.value) == (
        "MESHWEN_TARGET=amiga: it has to be one of linux-x86_64, linux-aarch64, macos-arm64, "
        "windows-x86_64, none"
    )


def test_the_systems_compiler_is_for_this_machine_where_there_is_no_pinned_one(script, monkeypatch):
    on(monkeypatch, "Linux", "x86_64")
    monkeypatch.setattr(script, "_probe", lambda *_: None)
    monkeypatch.setattr(script, "_name_and_version", lambda _: "gcc 12")
    monkeypatch.setattr(script, "find_spec", lambda name: name == "ziglang")
    assert script.compiler("macos-arm64").pinned
    monkeypatch.setattr(script, "find_spec", lambda _: None)
    monkeypatch.setattr(script.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    assert script.compiler("linux-x86_64") == (("/usr/bin/gcc",), False, "gcc 12")
    with pytest.raises(script.NoKernelsError, match="no C compiler for linux-aarch64 was found"):
        script.compiler("linux-aarch64")
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    with pytest.raises(script.NoKernelsError, match=r"pip install .ziglang"):
        script.compiler("linux-x86_64")


def test_a_command_that_is_named_takes_the_place_of_the_pinned_compiler(script, monkeypatch):
    on(monkeypatch, "Linux", "x86_64")
    monkeypatch.setattr(script, "find_spec", lambda _: True)
    assert script.requirements() == [script.ZIGLANG, script.JAXLIB]
    monkeypatch.setenv("MESHWEN_CC", "ccache gcc-12")
    assert script.requirements() == [script.JAXLIB]
    (one,) = script._candidates("linux-x86_64")
    assert (one.command, one.pinned) == (("ccache", "gcc-12"), False)
    (other,) = script._candidates("linux-aarch64")
    assert other.pinned
    monkeypatch.setenv("MESHWEN_TARGET", "linux-aarch64")
    assert script.requirements() == [script.ZIGLANG, script.JAXLIB]
    monkeypatch.setenv("MESHWEN_TARGET", "none")
    assert script.requirements() == []


def test_the_kernels_header_may_be_of_every_jax_that_the_package_runs_with(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (jax,) = [one for one in project["dependencies"] if one.startswith("jax>=")]
    assert jax.replace("!=0.10.2,", "") == script.JAXLIB.replace("jaxlib", "jax")


def test_pip_is_asked_for_the_compiler_by_the_build(script, monkeypatch):
    from hatchling.build import get_requires_for_build_wheel

    monkeypatch.chdir(ROOT)
    assert get_requires_for_build_wheel() == [script.ZIGLANG, script.JAXLIB]
    monkeypatch.setenv("MESHWEN_TARGET", "none")
    assert get_requires_for_build_wheel() == []


def test_the_system_compilers_wheel_on_macos_is_for_arm_alone(script, monkeypatch):
    monkeypatch.setattr(script.sysconfig, "get_platform", lambda: "macosx-10.9-universal2")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    by = script.Compiler(("cc",), pinned=False)
    assert script.wheel_tag("macos-arm64", by) == "py3-none-macosx_14_0_arm64"


def test_a_compiler_that_compiles_nothing_gives_way_to_the_next(script, fake, monkeypatch, capsys):
    broken, missing = fake.compiler(broken="probe.c"), script.Compiler(("/nowhere/cc",), False)
    works = fake.compiler()
    monkeypatch.setattr(script, "_candidates", lambda _: [broken, missing, works])
    assert script.compiler("linux-x86_64").command == works.command
    assert "unknown type name 'flaot'" in capsys.readouterr().err
    monkeypatch.setattr(script, "_candidates", lambda _: [broken, missing])
    with pytest.raises(script.NoKernelsError) as lacking:
        script.compiler("linux-x86_64")
    first, second = str(lacking.value).split("; ")
    assert first.endswith("cannot be used: int8.c:7:1: error: unknown type name 'flaot'")
    assert "No such file" in second


@pytest.mark.parametrize(
    ("command", "reason"),
    [("true", "cannot be used: error: it makes no file"), ("'", "is no command: No closing quot")],
)
def test_a_command_that_is_no_compiler_is_named(script, monkeypatch, command, reason):
    monkeypatch.setenv("MESHWEN_CC", command)
    with pytest.raises(script.NoKernelsError, match=reason):
        script.compiler(script.this_machine())


def test_a_folder_that_cannot_be_written_is_named(script, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(script, "build", lambda name, by, folder: folder.mkdir())
    monkeypatch.setattr(script, "compiler", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build_kernels.py", "--out", str(file)])
    with pytest.raises(SystemExit, match=f"cannot write {re.escape(str(file))}: File exists"):
        script.main()


def test_a_compiler_that_hangs_is_given_up(script, fake, monkeypatch):
    monkeypatch.setattr(script, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(script, "_candidates", lambda _: [fake.compiler(hangs="probe.c")])
    with pytest.raises(script.NoKernelsError, match=r"error: not done within 0\.5 seconds"):
        script.compiler("linux-x86_64")


@pytest.mark.parametrize("home", [None, "/proc/nonexistent"])
def test_the_pinned_compiler_needs_nothing_of_the_users(script, monkeypatch, home):
    pytest.importorskip("ziglang")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME")
    assert script.compiler("linux-x86_64").pinned


@pytest.mark.parametrize("target", ["linux-x86_64", "linux-aarch64", "macos-arm64"])
def test_every_instruction_set_of_a_target_is_compiled_once(script, fake, target, tmp_path):
    script.build(target, fake.compiler(), tmp_path)
    asked = fake.asked()
    compiled = [a[a.index("-c") + 1].rpartition("/")[2] for a in asked[:-1]]
    suffixed = {
        f"{name.removesuffix('.c')}_kernels_{argument.removeprefix('-DSUFFIX=')}"
        for name, arguments in zip(compiled, asked, strict=False)
        for argument in arguments
        if argument.startswith("-DSUFFIX=")
    }
    table = (script.SOURCES / "instruction_sets.c").read_text(encoding="utf-8")
    table = table[table.index("instruction_sets[] = {") :]
    x86, arm = table.split("#elif defined(__aarch64__)")
    part = x86 if "x86" in target else arm
    part += table[table.index("#endif") :]
    assert suffixed == set(re.findall(r"(?:float|int8)_kernels_\w+", part))
    assert {*compiled} == {path.name for path in script.SOURCES.glob("*.c")}
    assert all("-ffp-contract=off" in arguments for arguments in asked[:-1])
    assert "-shared" in asked[-1]


def test_a_compiler_is_named_by_its_macros(script, monkeypatch):
    macros = "#define __GNUC__ {}\n#define __GNUC_MINOR__ 2\n#define __GNUC_PATCHLEVEL__ 1\n"
    clang = (
        "#define __clang_major__ 22\n#define __clang_minor__ 1\n#define __clang_patchlevel__ 8\n"
    )

    def named(defined, pinned=False):
        monkeypatch.setattr(script, "_run", lambda *asked: Path(asked[-1]).write_text(defined))
        return script._name_and_version(script.Compiler(("/usr/bin/cc",), pinned))

    assert named(macros.format(12)) == "gcc 12.2.1"
    assert named(macros.format(4) + clang) == "clang 22.1.8"
    monkeypatch.setattr(script, "version", {"ziglang": "0.17.1"}.get)
    assert named(macros.format(4) + clang, pinned=True) == "clang 22.1.8 (ziglang 0.17.1)"
    assert named("") == "cc"


def test_the_library_is_told_what_compiles_it_and_from_what(script, fake, tmp_path, capsys):
    script.build("linux-x86_64", fake.compiler()._replace(name="gcc 12.2.0"), tmp_path)
    for arguments in fake.asked()[:-1]:
        assert '-DMESHWEN_COMPILER="gcc 12.2.0"' in arguments
        assert f'-DMESHWEN_SOURCES="{script.digest()}"' in arguments
    assert "libkernels.so: compiled by gcc 12.2.0" in capsys.readouterr().err


def test_zig_is_told_of_arm_in_its_own_words(script, fake, tmp_path):
    script.build("linux-aarch64", fake.compiler(), tmp_path)
    flags = {flag for arguments in fake.asked() for flag in arguments}
    assert {"-mcpu=generic+bf16", "-mcpu=generic+dotprod"} <= flags
    assert not any(flag.startswith("-march") for flag in flags)
    fake.log.unlink()
    script.build("linux-aarch64", fake.compiler(pinned=False), tmp_path)
    flags = {flag for arguments in fake.asked() for flag in arguments}
    assert {"-march=armv8.2-a+bf16", "-march=armv8.2-a+dotprod"} <= flags


def test_what_an_old_compiler_does_not_know_is_left_out(script, fake, tmp_path, capsys):
    old = fake.compiler(broken="-mavxvnni", pinned=False)
    script.build("linux-x86_64", old._replace(name="gcc 10.2.0"), tmp_path)
    compiled = [arguments for arguments in fake.asked() if "-DSUFFIX=" in " ".join(arguments)]
    assert len(compiled) == len(script.UNITS["x86_64"]) - 1
    assert not any("-mavxvnni" in arguments for arguments in compiled)
    assert any(one.endswith("/absent.c") for arguments in fake.asked() for one in arguments)
    assert "without avx_vnni of int8.c: gcc 10.2.0 is old" in capsys.readouterr().err


def test_a_library_takes_the_place_of_one_that_is_loaded(script, fake, tmp_path):
    (tmp_path / "libkernels.so").write_text("the old library")
    with (tmp_path / "libkernels.so").open() as loaded:
        assert script.build("linux-x86_64", fake.compiler(), tmp_path).read_text() == "a library"
        assert loaded.read() == "the old library"
    assert sum(1 for _ in tmp_path.glob("*libkernels*")) == 1


def test_a_source_that_does_not_compile_is_told_in_the_compilers_words(script, fake, tmp_path):
    with pytest.raises(SystemExit, match=r"the kernels do not compile: .*int8\.c") as failed:
        script.build("linux-x86_64", fake.compiler(broken="int8.c"), tmp_path / "out")
    assert "int8.c:7:1: error: unknown type name 'flaot'" in str(failed.value)
    assert not (tmp_path / "out").exists()


def test_the_library_before_stays_where_a_source_does_not_compile(script, fake, tmp_path):
    (tmp_path / "libkernels.so").write_text("the old library")
    with pytest.raises(SystemExit):
        script.build("linux-x86_64", fake.compiler(broken="int8.c"), tmp_path)
    assert (tmp_path / "libkernels.so").read_text() == "the old library"


def test_without_jaxlibs_header_the_build_says_what_to_install(script, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "find_spec", lambda _: None)
    with pytest.raises(script.NoKernelsError, match="pip install jaxlib"):
        script.build("linux-x86_64", fake.compiler(), tmp_path)


def built_wheel(monkeypatch, folder):
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    return folder / build_wheel(str(folder))


@pytest.mark.parametrize(
    ("target", "library", "tag"),
    [
        ("linux-aarch64", "libkernels.so", "manylinux_2_17_aarch64"),
        ("macos-arm64", "libkernels.dylib", "macosx_11_0_arm64"),
        ("windows-x86_64", "kernels.dll", "win_amd64"),
    ],
)
def test_a_wheel_has_its_targets_library_and_tag(
    script, fake, monkeypatch, tmp_path, target, library, tag
):
    before = {path.name: path.stat().st_mtime for path in script.LIBRARIES.iterdir()}
    monkeypatch.setenv("MESHWEN_TARGET", target)
    monkeypatch.setattr(script, "compiler", lambda _: fake.compiler())
    wheel = built_wheel(monkeypatch, tmp_path)
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    files = zipfile.ZipFile(wheel)
    place = "meshwen/ops/cpu/kernels/"
    names = [name.removeprefix(place) for name in files.namelist() if name.startswith(place)]
    assert [name for name in names if not name.endswith(".py")] == [library]
    assert files.read(place + library) == b"a library"
    assert not any("csrc" in name for name in files.namelist())
    after = {path.name: path.stat().st_mtime for path in script.LIBRARIES.iterdir()}
    assert after == before  # An editable installation beside it keeps its library.


def test_the_source_distribution_has_what_its_pages_tell_to_run(monkeypatch, tmp_path):
    from hatchling.build import build_sdist

    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as packed:
        files = {name.partition("/")[2] for name in packed.getnames()}
    assert {"Makefile", "pyproject.toml", "hatch_build.py", "scripts/find_python.sh"} <= files
    assert "src/meshwen/ops/cpu/csrc/build.c" in files
    assert not any(re.search(r"\.(so|dylib|dll)$", name) for name in files)


@pytest.mark.parametrize("lacking", [True, False])
def test_an_editable_installation_keeps_no_library_of_other_sources(
    script, fake, monkeypatch, tmp_path, lacking
):
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(str(ROOT))
    hook = importlib.import_module("hatch_build").KernelsHook(str(ROOT), {}, *[None] * 4)
    library = tmp_path / script.TARGETS[script.chosen()].filename
    library.write_text("the old library")
    monkeypatch.setattr(script, "LIBRARIES", tmp_path)
    if lacking:
        monkeypatch.setattr(script, "_candidates", lambda _: [])
        hook.initialize("editable", {})
        assert not library.exists()
    else:  # It stays, and is refused where it is loaded.
        monkeypatch.setattr(script, "compiler", lambda _: fake.compiler(broken="int8.c"))
        with pytest.raises(SystemExit):
            hook.initialize("editable", {})
        assert library.exists()


def test_without_a_compiler_the_wheel_has_no_kernels_and_a_line_says_so(
    script, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr(script, "_candidates", lambda _: [])
    wheel = built_wheel(monkeypatch, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(re.search(r"\.(so|dylib|dll)$", n) for n in zipfile.ZipFile(wheel).namelist())
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "compiler" in one]
    assert "meshwen is built without its kernels: no C compiler" in line


@pytest.mark.parametrize("named", [("MESHWEN_CC", "gcc-99"), ("MESHWEN_TARGET", "linux-aarch64")])
def test_kernels_that_were_asked_for_are_not_left_out(script, monkeypatch, tmp_path, capfd, named):
    monkeypatch.setenv(*named)
    monkeypatch.setattr(script, "_candidates", lambda _: [])
    with pytest.raises(SystemExit):
        built_wheel(monkeypatch, tmp_path)
    assert "the kernels that were asked for cannot be built: no C comp" in capfd.readouterr().err


def test_a_source_that_does_not_compile_fails_the_installation(script, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "compiler", lambda _: fake.compiler(broken="int8.c"))
    with pytest.raises(SystemExit, match="the kernels do not compile"):
        built_wheel(monkeypatch, tmp_path)

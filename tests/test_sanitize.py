"""How compute-sanitizer's output is read; what it says of the kernels takes a GPU and `make sanitize`."""

from tests.sanitize import read_reports

PRINTED = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at pallas_qk_triton_forward+0x3f0
=========     by thread (3,0,0) in block (7,0,0)
=========     Access at 0x7f1200000400 is out of bounds
=========         Host Frame: cuLaunchKernel [0x2f2a1f]
=========
every kernel ran
========= Warning: Race reported between Read access at loop_add_fusion+0x10
=========     and Write access at loop_add_fusion+0x20 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
========= ERROR SUMMARY: 2 errors
"""


def test_reports_are_told_apart():
    write, race = read_reports(PRINTED)
    assert write.title == "Invalid __global__ write of size 16 bytes"
    assert "pallas_qk_triton_forward" in write.text and "pallas_qk_" not in race.text
    assert race.text.splitlines()[1].startswith("and Write access")


def test_a_clean_run_has_none():
    assert read_reports("========= COMPUTE-SANITIZER\nevery kernel ran\n========= ERROR SUMMARY: 0 errors\n") == []

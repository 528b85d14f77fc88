"""What broken rules do through the monitor, and NVML by a stand-in of the driver's library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from serving_fixtures import Scene, audit_of, make_model

from act_pipeline.core.errors import UserError
from act_pipeline.serving import Monitor, Repository, Temperature, load_rules, nvml, promote
from act_pipeline.serving.temperature import NOT_AVAILABLE, Sensor

ROLL_BACK_ERRORS = "{metric: error_rate, above: 0.1, min_count: 10, action: roll_back}"
SPARE_WHEN_HOT = "{metric: temperature, above: 85, clear: 75, min_count: 1, action: switch_to_spare}"


class Service:
    """A repository with versions 1, 2, ... promoted one after the other, and a monitor with rules of the test."""

    def __init__(
        self,
        root: Path,
        *rules: str,
        shares: tuple[int, ...] = (100, 100),
        spare: bool = False,
        background: bool = False,
    ) -> None:
        self.repository, self.now, self.degrees = Repository.open(root / "repository", create=True), 0.0, 50.0
        for number, share in enumerate(shares, start=1):
            promote(self.repository, make_model(root / str(number), str(number)), share)
        if spare:
            promote(self.repository, make_model(root / "spare", "spare"), spare=True)
        chosen = load_rules(overrides=[f"rules=[{', '.join(rules)}]", "window.check_every=10"])
        self.monitor = Monitor(
            self.repository, chosen, None, lambda: Temperature(self.degrees, "recorded"), lambda: self.now, background
        )

    def serve(self, requests: int, fails: Callable[[int], bool] = lambda version: False) -> None:
        scene = Scene()
        for number in range(requests):
            self.now += 0.1
            version = self.monitor.route(f"r{number}")
            assert version is not None
            if fails(version):
                self.monitor.failed(version, f"r{number}", 0.03)
            else:
                self.monitor.answered(version, f"r{number}", scene.int8_detections(number), 0.03)

    @property
    def shares(self) -> dict[int, int]:
        return self.repository.state().shares()

    def by_rules(self) -> list[dict]:
        return [entry for entry in audit_of(self.repository.folder) if entry.get("by") == "rule"]


def test_a_live_version_that_fails_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS)
    service.serve(60, lambda version: version == 2)
    assert service.shares == {1: 100} and service.repository.state().automatic
    (entry,) = service.by_rules()
    assert (entry["event"], entry["version"], entry["role"], entry["metric"]) == ("roll_back", 2, "live", "error_rate")
    assert entry["value"] == 1.0 and entry["answered"] == 20
    # Version 1 fails too: a rule takes back one change of a person, not two.
    service.serve(60, lambda version: True)
    assert service.shares == {1: 100}
    (alarm,) = service.by_rules()[1:]
    assert alarm["event"] == "alarm" and alarm["instead_of"] == "roll_back"
    assert alarm["reason"] == "a rule made version 1 live already; a person decides what comes next"
    # A person promotes: the rules act again.
    promote(service.repository, tmp_path / "2")
    service.serve(60, lambda version: version == 2)
    assert [entry["event"] for entry in service.by_rules()] == ["roll_back", "alarm", "roll_back"]


def test_without_an_earlier_version_a_roll_back_is_an_alarm(tmp_path: Path) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS, shares=(100,))
    service.serve(100, lambda version: True)
    (alarm,) = service.by_rules()
    assert (alarm["event"], alarm["instead_of"]) == ("alarm", "roll_back") and service.shares == {1: 100}
    assert "no earlier version to roll back to" in alarm["reason"]


def test_a_live_version_in_doubt_takes_the_candidate_back_too(tmp_path: Path) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS, shares=(100, 100, 10))
    service.serve(200, lambda version: version == 2)
    assert service.shares == {1: 100} and service.by_rules()[0]["version"] == 2


def test_an_alarm_changes_nothing_and_sounds_once(tmp_path: Path) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS.replace("roll_back", "alarm"))
    service.serve(200, lambda version: True)
    assert service.shares == {2: 100} and [entry["event"] for entry in service.by_rules()] == ["alarm"]
    assert service.monitor.figures()["versions"]["2"]["counters"]["decisions"] == 1


@pytest.mark.parametrize("shares", [(100,), (100, 50)])
def test_a_hot_device_switches_to_the_spare_version(tmp_path: Path, shares: tuple[int, ...]) -> None:
    spare = len(shares) + 1
    service = Service(tmp_path, SPARE_WHEN_HOT, shares=shares, spare=True)
    service.serve(30)
    assert not service.by_rules()
    service.degrees = 90.0
    service.serve(30)
    assert service.shares == {spare: 100} and service.repository.state().automatic
    (entry,) = service.by_rules()
    assert (entry["event"], entry["value"], entry["figures"]["source"]) == ("switch_to_spare", 90.0, "recorded")
    # Still hot with the spare version: an alarm at most, and only after it has cooled down in between.
    service.serve(60)
    assert len(service.by_rules()) == 1
    service.degrees = 70.0
    service.serve(10)
    service.degrees = 90.0
    service.serve(30)
    assert [entry["event"] for entry in service.by_rules()] == ["switch_to_spare", "alarm"]


def test_a_hot_device_without_a_spare_version_takes_the_candidate_back(tmp_path: Path) -> None:
    service = Service(tmp_path, SPARE_WHEN_HOT, shares=(100, 50))
    service.degrees = 90.0
    service.serve(40)
    assert service.shares == {1: 100} and service.by_rules()[0]["event"] == "roll_back"


def test_a_low_map_of_posted_labels_rolls_back(tmp_path: Path) -> None:
    rule = "{metric: map_drop, above: 0.05, min_count: 20, checks: 1, action: roll_back}"
    service = Service(tmp_path, rule)  # the records say mAP 0.5
    scene = Scene()
    kept = True
    for number in range(40):
        service.monitor.answered(2, f"r{number}", scene.int8_detections(number), 0.03)
        wrong = scene.objects(number) + [0, 300, 300, 300, 300]
        kept = kept and service.monitor.post_labels(f"r{number}", wrong)
    (entry,) = service.by_rules()
    assert entry["metric"] == "map_drop" and entry["value"] > 0.4 and service.shares == {1: 100}
    assert entry["figures"]["labelled"] >= 20 and not kept  # version 2 answers no more: its labels are not asked for


def test_labels_are_scored_again_only_when_new_ones_have_come(tmp_path: Path, monkeypatch) -> None:
    from act_pipeline.serving import monitor

    scored: list[int] = []
    monkeypatch.setattr(monitor, "mean_average_precision", lambda images: scored.append(len(images)) or 0.4)
    service = Service(tmp_path, "{metric: map, below: 0.1, min_count: 5}")
    scene = Scene()
    for number in range(8):
        service.monitor.answered(2, f"r{number}", scene.int8_detections(number), 0.03)
        assert service.monitor.post_labels(f"r{number}", scene.objects(number))
    assert service.monitor.figures()["versions"]["2"]["window"]["map"] is None  # not before a check
    service.monitor.check()
    service.monitor.check()
    assert scored == [8] and service.monitor.figures()["versions"]["2"]["window"]["map"] == 0.4


def test_no_request_waits_for_a_check_in_the_background(tmp_path: Path, monkeypatch) -> None:
    """The disk, the lock of the repository and the mAP may take seconds."""
    from act_pipeline.serving import monitor
    from act_pipeline.serving.decisions import act

    entered, going_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> object:
        entered.set()
        assert going_on.wait(20)
        return act(*arguments)

    monkeypatch.setattr(monitor, "act", slow)
    service = Service(tmp_path, ROLL_BACK_ERRORS, background=True)
    for _ in range(500):
        service.serve(10, lambda version: version == 2)
        if entered.wait(0.02):
            break
    assert entered.is_set() and service.shares == {2: 100}
    service.serve(50, lambda version: version == 2)  # answered while the rule acts
    assert service.monitor.figures() and service.monitor.prometheus()
    going_on.set()
    service.monitor.close()
    assert service.shares == {1: 100} and len(service.by_rules()) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "rules"]


def test_the_checking_thread_survives_what_nobody_foresaw(tmp_path: Path, monkeypatch, caplog) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS, background=True)
    asked = threading.Semaphore(0)

    def broken() -> Temperature:
        asked.release()
        raise RuntimeError("the sensor's driver")

    monkeypatch.setattr(service.monitor, "_sensor", broken)
    for _ in range(2):
        service.serve(10)
        assert asked.acquire(timeout=20)
    service.monitor.close()
    assert "the rules could not be checked" in caplog.text and "the sensor's driver" in caplog.text


def test_a_rule_tries_again_when_the_repository_is_locked_or_the_disk_full(tmp_path: Path, monkeypatch, caplog) -> None:
    service = Service(tmp_path, ROLL_BACK_ERRORS)
    for error in (UserError("another process has been changing it"), OSError(28, "No space left on device")):

        def refused(repository: Repository, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Repository, "changing", refused)
            service.serve(40, lambda version: version == 2)
            assert service.shares == {2: 100} and str(error) in caplog.text
    service.serve(20, lambda version: version == 2)
    assert service.shares == {1: 100} and len(service.by_rules()) == 1


def test_a_version_that_a_person_took_back_meanwhile_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    from act_pipeline.serving import monitor, roll_back
    from act_pipeline.serving.decisions import act

    service = Service(tmp_path, ROLL_BACK_ERRORS, shares=(100, 50))

    def late(repository: Repository, *arguments: object) -> object:
        roll_back(repository)
        return act(repository, *arguments)

    monkeypatch.setattr(monitor, "act", late)
    service.serve(60, lambda version: version == 2)
    assert service.shares == {1: 100} and not service.by_rules()


class Driver:
    """NVML's functions for GPUs of given temperatures; None: the GPU is lost."""

    def __init__(self, *degrees: int | None, init: int = 0) -> None:
        self.degrees, self.init = degrees, init

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.init

    def nvmlDeviceGetCount_v2(self, count) -> int:  # noqa: N802
        count._obj.value = len(self.degrees)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device) -> int:  # noqa: N802
        device._obj.value = 1000 + index
        return 0

    def nvmlDeviceGetTemperature(self, device, sensor, degrees) -> int:  # noqa: N802
        found = self.degrees[device.value - 1000]
        assert sensor == 0
        degrees._obj.value = found or 0
        return 15 if found is None else 0  # NVML_ERROR_GPU_IS_LOST


def test_nvml_tells_the_hottest_gpu(monkeypatch, tmp_path: Path) -> None:
    assert nvml.hottest_gpu(Driver(40, 71, 55)) == (71.0, "NVML GPU 1")
    assert nvml.hottest_gpu(Driver(40, None)) == (40.0, "NVML GPU 0")
    assert nvml.hottest_gpu(Driver(None)) is None and nvml.hottest_gpu(Driver()) is None
    loaded: list[str] = []

    def load(driver: object) -> Callable[[str], object]:
        return lambda name: loaded.append(name) or driver

    monkeypatch.setattr(nvml.ctypes, "CDLL", load(Driver(66)))
    assert Sensor(tmp_path)() == Temperature(66.0, "NVML GPU 0") and loaded == ["libnvidia-ml.so.1"]
    # The driver is not running, is too old for these functions, or is not there.
    monkeypatch.setattr(nvml.ctypes, "CDLL", load(Driver(66, init=9)))
    assert nvml.load_nvml() is None
    monkeypatch.setattr(nvml.ctypes, "CDLL", load(SimpleNamespace()))
    assert nvml.load_nvml() is None

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(nvml.ctypes, "CDLL", absent)
    assert Sensor(tmp_path)() == Temperature(None, NOT_AVAILABLE)


def test_a_gpu_comes_before_other_sensors_and_they_take_over_when_it_is_lost(tmp_path: Path) -> None:
    chip = tmp_path / "class" / "hwmon" / "hwmon0"
    chip.mkdir(parents=True)
    (chip / "name").write_text("coretemp\n")
    (chip / "temp1_input").write_text("48000\n")
    driver = Driver(80)
    sensor = Sensor(tmp_path, driver)
    assert sensor() == Temperature(80.0, "NVML GPU 0")
    driver.degrees = (None,)
    assert sensor() == Temperature(48.0, "hwmon coretemp")


_LIBRARY = """
#include <stdint.h>
typedef void* device_t;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t* device) {
    *device = (device_t)((uintptr_t)0x7f0011223300 + index); return 0;
}
int nvmlDeviceGetTemperature(device_t device, int sensor, unsigned int* degrees) {
    uintptr_t index = (uintptr_t)device - 0x7f0011223300;
    if (index > 1 || sensor != 0) return 2;
    *degrees = index ? 77 : 60; return 0;
}
"""


def test_nvml_is_called_as_its_c_interface_is(tmp_path: Path, monkeypatch) -> None:
    """Handles of 64 bits arrive whole: ctypes cuts a plain number to 32."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "nvml.c").write_text(_LIBRARY)
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(nvml, "LIBRARY", str(library))
    assert isinstance(nvml.load_nvml(), ctypes.CDLL)
    assert Sensor(tmp_path)() == Temperature(77.0, "NVML GPU 1")

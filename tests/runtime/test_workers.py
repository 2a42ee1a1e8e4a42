"""Work in several processes, here and on Ray: the same results, in order, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import worker_tasks

import billhook
from billhook.errors import BillhookError
from billhook.runtime.workers import Workers, _room, portions, worker_pool

ray = pytest.importorskip("ray")
os.environ["RAY_AUTH_MODE"] = "disabled"  # or it leaves a token in the home folder, which later clusters then ask for
HERE = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of this process with one core, whose workers can import the tests; with two, threads wait for one
    another."""
    path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    yield "auto"
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.model("llama").save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    (made / "text.txt").write_text(tiny.text())
    return made


def test_portions_are_even_and_whole() -> None:
    assert portions(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert portions(2, 5) == [range(0, 1), range(1, 2)]


@pytest.mark.parametrize("workers", [Workers(2), Workers(ray="auto")], ids=["jobs", "ray"])
def test_every_process_is_prepared_and_results_come_in_order(workers: Workers, cluster: str) -> None:
    with worker_pool(workers, "cpu", partial(worker_tasks.prepare, 100)) as pool:
        assert list(pool.map(worker_tasks.add, range(5), 3)) == [100, 103, 106, 109, 112]
        with pytest.raises(BillhookError, match=r"^item [01] cannot work$"):  # whichever is first to say so
            list(pool.map(worker_tasks.fail, range(2)))
    assert pool.size == workers.jobs  # a Ray task takes all cores of a machine


@pytest.mark.parametrize("workers", [Workers(2), Workers(ray="auto")], ids=["jobs", "ray"])
def test_what_a_generator_yields_comes_as_it_is_made(workers: Workers, cluster: str, tmp_path: Path) -> None:
    """The second thing is made only once the first was seen: a flow that waited for the end would never end."""
    with worker_pool(workers, "cpu", partial(worker_tasks.prepare, 10)) as pool:
        seen = []
        for one in pool.map_stream(worker_tasks.count_when_asked, ["a", "b", "c"], str(tmp_path)):
            (tmp_path / one).touch()
            seen.append(one)
        assert sorted(seen) == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
        assert [one for one in seen if one[0] == "b"] == ["b0", "b1", "b2"]
        assert list(pool.map_stream(worker_tasks.count_when_asked, [], str(tmp_path))) == []


@pytest.mark.parametrize("amid", [pytest.param(False, marks=pytest.mark.whole), True], ids=["work", "what it yields"])
def test_what_a_dead_ray_worker_had_is_done_again_and_comes_once(amid: bool, cluster: str, tmp_path: Path) -> None:
    with worker_pool(Workers(ray=cluster), "cpu", partial(worker_tasks.prepare, 100)) as pool:
        if amid:
            found = list(pool.map_stream(worker_tasks.die_midway, range(2), str(tmp_path)))
            assert sorted(found) == [100, 101, 102, 110, 111, 112]
        else:
            assert list(pool.map(worker_tasks.die_once, range(3), str(tmp_path))) == [100, 101, 102]
    assert (tmp_path / "dead").exists()


def test_a_dead_process_of_this_machine_is_said(tmp_path: Path) -> None:
    with (
        worker_pool(Workers(2), "cpu", partial(worker_tasks.prepare, 10)) as pool,
        pytest.raises(BillhookError, match=r"--jobs: a worker process died"),
    ):
        list(pool.map(worker_tasks.die_once, range(3), str(tmp_path)))


EMPLOYER = """
import time, worker_tasks
from functools import partial
from billhook.runtime.workers import Workers, worker_pool

if __name__ == "__main__":
    with worker_pool(Workers(2), "cpu", partial(worker_tasks.prepare, 0)) as pool:
        print(*pool.map(worker_tasks.pid, range(2)), flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_whom_they_work_for(tmp_path: Path) -> None:
    """Killed, it tells them nothing."""
    script, environment = tmp_path / "employer.py", os.environ | {"PYTHONPATH": HERE}
    script.write_text(EMPLOYER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as employer:
        assert employer.stdout is not None
        workers = [psutil.Process(int(one)) for one in employer.stdout.readline().split()]
        assert len(workers) == 2 and all(one.is_running() for one in workers)
        employer.kill()
    assert not psutil.wait_procs(workers, timeout=20)[1]


GIVEN = {"method": "fasp", "samples": 8, "seq_len": 32, "multiple_of": 1}
WAYS = {
    "fasp": {"ratio": 0.3, "stream": "dense", "axes": ("ffn", "heads")},
    "fistapruner": {"method": "fistapruner", "sparsity": 0.5},
    "adapruner": {"method": "adapruner", "ratio": 0.3, "trials": 4, "pool": 12, "pool_len": 16, "clusters": 2},
}


@pytest.mark.parametrize("way", ["fasp", "fistapruner", pytest.param("adapruner", marks=pytest.mark.whole)])
def test_ray_makes_the_same_model(way: str, cluster: str, folder: Path) -> None:
    given = {"calibration": str(folder / "text.txt"), **GIVEN, **WAYS[way]}
    alone = billhook.prune(folder, **given)
    spread = billhook.prune(folder, ray=cluster, stream_weights=way == "fasp", **given)
    with billhook.runtime.offload.loaded(spread.model.model.layers[0]):
        pass
    _assert_equal(alone, spread)


def _assert_equal(one: billhook.Result, two: billhook.Result) -> None:
    for n, (a, b) in enumerate(zip(one.model.model.layers, two.model.model.layers, strict=True)):
        with billhook.runtime.offload.loaded(a), billhook.runtime.offload.loaded(b):
            found = dict(b.named_parameters())
            for name, param in a.named_parameters():
                assert param.equal(found[name]), (n, name)
    for key in ("cuts", "zeros"):
        assert one.record[key] == two.record[key]


@pytest.mark.parametrize(
    "address, says",
    [
        (
            "127.0.0.1:1",
            r"--ray 127\.0\.0\.1:1: no Ray cluster answers \(.*refused.*\): start one with 'ray start --head'; if",
        ),
        ("somewhere", r"--ray somewhere: write auto, or HOST:PORT as 'ray start --head' prints it"),
    ],
)
def test_an_address_that_does_not_answer_is_refused_at_once(address: str, says: str, folder: Path) -> None:
    started = time.monotonic()
    with (
        pytest.raises(BillhookError, match=says),
        worker_pool(Workers(ray=address), "cpu", partial(worker_tasks.prepare, 1)),
    ):
        pass
    assert time.monotonic() - started < 20


def test_a_task_takes_what_every_machine_has() -> None:
    cpus, gpus = [{"CPU": 4.0}, {"CPU": 9.0}, {"memory": 1.0}], [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert _room(cpus, "auto", "cpu") == (3, 4, 0)
    assert _room(gpus, "auto", "cuda") == (2, 8, 1)
    with pytest.raises(BillhookError, match="its machines have no free GPU"):
        _room(cpus, "auto", "cuda")


def test_a_ray_task_sees_its_gpu_alone_whichever_this_process_has() -> None:
    third = torch.device("cuda", 3)
    assert (Workers(ray="auto").device(third), Workers(2).device(third)) == ("cuda", "cuda:3")


@pytest.mark.slow
def test_a_machine_killed_in_the_middle_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """Two machines as docs/scale.md starts them; the second is gone once it works on its layers."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus", "1", "--disable-usage-stats"]
    environment = os.environ | {"RAY_health_check_period_ms": "1000"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "check": True}
    subprocess.run([*command, "--head", "--port", "6390", "--include-dashboard", "false"], **quiet)
    try:
        before = {one.pid for one in psutil.process_iter() if one.name() == "raylet"}
        subprocess.run([*command, "--address", "127.0.0.1:6390"], **quiet)
        (second,) = [one for one in psutil.process_iter() if one.name() == "raylet" and one.pid not in before]
        text = str(folder / "text.txt")
        given = ["--sparsity", "0.5", "--calibration", text, "--samples", "8", "--seq-len", "32"]
        prune = [sys.executable, "-m", "billhook", "prune", str(folder), "--method", "fistapruner", *given]
        work = subprocess.Popen([*prune, "--ray", "127.0.0.1:6390", "-o", str(tmp_path / "spread")], env=environment)
        while not (busy := [one for one in second.children(True) if one.name().startswith("ray::_on_a_w")]):
            assert work.poll() is None, "it ended before the second machine had anything"
            time.sleep(0.05)
        for one in (second, *busy):
            one.send_signal(signal.SIGKILL)
        assert work.wait(300) == 0
    finally:
        subprocess.run([command[0], "stop", "--force"], **quiet)
    alone = [*prune, "-o", str(tmp_path / "alone")]
    subprocess.run(alone, check=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "spread"))
    assert one == two

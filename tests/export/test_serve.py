"""The packed folders, served by a real tritonserver on this machine and asked by tritonclient over HTTP and gRPC."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline

from export import serve
from export.triton_image import triton_image
from tests.export.conftest import MAX_LENGTH, build_tokenizer, free_ports
from trainer.__main__ import main
from trainer.artifact import content_hash, hash_tree, read_artifact, write_json
from trainer.errors import GateFailed, UserError

ROOT = Path(__file__).parents[2]
TEXTS = [
    "return first",
    "class Point:\n    x = 0\n    y = 1",
    "def add(first, second):\n    return first + a b c d e f",
]


@pytest.fixture(scope="session")
def client(packed, tmp_path_factory):
    """The client that was packed, as a module; of a copy, as importing it may leave byte code beside it."""
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    copy = shutil.copy(packed / "bert" / "client.py", tmp_path_factory.mktemp("client"))
    spec = importlib.util.spec_from_file_location("client", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def clients(packed, environment, client, tmp_path_factory):
    """Clients of one server that has the models of four packed folders: (protocol's client, its module)."""
    import tritonclient.grpc
    import tritonclient.http

    scratch = tmp_path_factory.mktemp("server")
    for name in ("bert", "gpt2", "bert_classifier", "bert_answers"):
        shutil.copytree(packed / name / "models", scratch / "all" / "models", dirs_exist_ok=True)
    http, grpc, metrics = free_ports()
    site = serve.ensure_environment(environment, triton_image())
    with serve.serving(scratch / "all", site, serve.Endpoints("127.0.0.1", http, grpc, metrics), scratch):
        pairs = [
            (tritonclient.http.InferenceServerClient(f"127.0.0.1:{http}"), tritonclient.http),
            (tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc}"), tritonclient.grpc),
        ]
        yield pairs
        for each, _ in pairs:
            each.close()  # the server waits for open connections as it stops


def assert_same_scores(found, expected):
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)


def test_masked_texts_are_filled_as_transformers_does_it(clients, client, model_folder):
    """Also in one request of unequal texts, of which the longer makes the others padded."""
    texts = [f"{text} [MASK]" for text in TEXTS]
    folder = model_folder("bert")
    tokenizer = build_tokenizer()
    fill = pipeline("fill-mask", AutoModelForMaskedLM.from_pretrained(folder), tokenizer=tokenizer, top_k=3)
    for each in clients:
        for text, answer in zip(texts, client.ask(*each, texts, "bert_text"), strict=True):
            (candidates,) = answer
            expected = fill(text)
            assert [one["token"] for one in candidates] == [one["token"] for one in expected]
            assert [one["token_str"] for one in candidates] == [one["token_str"] for one in expected]
            assert_same_scores(candidates, expected)
            assert candidates[0]["sequence"].endswith(tokenizer.decode([candidates[0]["token"]]))
        (two,) = client.ask(*each, ["[MASK] a [MASK]"], "bert_text")
        expected = fill("[MASK] a [MASK]")
        assert [[one["sequence"] for one in place] for place in two] == [
            [one["sequence"] for one in place] for place in expected
        ]


def test_next_token_is_that_of_generate(clients, client, model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder("gpt2")), build_tokenizer()
    for each in clients:
        for text, answer in zip(TEXTS, client.ask(*each, TEXTS, "gpt2_text"), strict=True):
            batch = tokenizer(text, return_tensors="pt")
            generated = model.generate(
                batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=1, do_sample=False
            )
            assert answer[0]["token"] == generated[0, -1].item()
            assert answer[0]["token_str"] == tokenizer.decode([answer[0]["token"]])


def test_classes_are_those_of_transformers(clients, client, model_folder):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder("bert_classifier"))
    classify = pipeline("text-classification", model, tokenizer=build_tokenizer(), top_k=3)
    for each in clients:
        for text, answer in zip(TEXTS, client.ask(*each, TEXTS, "bert_classifier_text"), strict=True):
            (expected,) = classify([text])
            assert [one["label"] for one in answer] == [one["label"] for one in expected]
            assert_same_scores(answer, expected)


def test_questions_are_answered_from_two_texts(clients, client):
    """What the answers are is held against transformers where the Python models are called directly."""
    rows = [("what is first", text) for text in TEXTS]
    for each in clients:
        for (_, context), answer in zip(
            rows, client.ask(*each, rows, "bert_answers_text", ["QUESTION", "CONTEXT"]), strict=True
        ):
            assert answer and all(context[one["start"] : one["end"]] == one["answer"] for one in answer)


def test_requests_share_calls_and_answers_do_not_mix(clients, client):
    """Eight at once: fewer calls of the network than texts, and each answer is that of its text alone."""
    grpc, module = clients[1]
    alone = {text: client.ask(grpc, module, [text], "gpt2_text") for text in TEXTS}
    before = calls(grpc, "gpt2")
    asked = TEXTS * 16
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: client.ask(grpc, module, [text], "gpt2_text"), asked))
    for text, (answer,) in zip(asked, answers, strict=True):
        assert [one["token"] for one in answer] == [one["token"] for one in alone[text][0]]
        assert_same_scores(answer, alone[text][0])
    after = calls(grpc, "gpt2", before[0] + len(asked))
    texts, executions = (now - then for now, then in zip(after, before, strict=True))
    assert texts == len(asked) and executions < texts


def calls(grpc, model, texts=0) -> tuple[int, int]:
    """Texts that a model has seen, so many at least, and calls that it took: read until they stand still, as a server
    counts a request after it has answered it."""
    end, before = time.monotonic() + 10, None
    while True:
        (stats,) = grpc.get_inference_statistics(model, as_json=True)["model_stats"]
        seen = int(stats["inference_count"]), int(stats["execution_count"])
        if (seen == before and seen[0] >= texts) or time.monotonic() > end:
            return seen
        before = seen
        time.sleep(0.3)


def test_texts_without_an_answer_are_refused_by_name(clients, client):
    for grpc, module in clients:
        for model, text, message in (
            ("bert_text", "return first", r"no mask token in the text: write \[MASK\]"),
            ("gpt2_text", "", "a text without tokens"),
            ("gpt2_text", "x " * 2 * MAX_LENGTH, f"tokens; the model takes {MAX_LENGTH}"),
        ):
            with pytest.raises(Exception, match=message):
                client.ask(grpc, module, [text], model)
        assert client.ask(grpc, module, TEXTS[:1], "gpt2_text")  # the server goes on


def test_the_verb_serves_until_it_is_stopped(packed, environment, client, tmp_path):
    """README's two commands: the packed client asks the server, SIGTERM ends the verb and the server with it."""
    readme = (
        (ROOT / "README.md").read_text(encoding="utf-8").replace("runs/quickstart/pack/student", str(packed / "bert"))
    )
    serving, asking = re.findall(r"```\nlmworks (serve .*)\npython (.*)\n```", readme)[0]
    http, grpc, metrics = free_ports()
    before = hash_tree(packed / "bert")
    command = [sys.executable, "-m", "trainer", *shlex.split(serving), "--environment", str(environment),
               "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]  # fmt: skip
    errors = (tmp_path / "errors").open("w")
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    served = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert f"bert_text answers texts on http://127.0.0.1:{http}" in served.stdout.readline()
        ask = [sys.executable, *shlex.split(asking), "--url", f"127.0.0.1:{grpc}"]
        answer = json.loads(subprocess.run(ask, capture_output=True, text=True, check=True).stdout)
        assert len(answer[0]) == 3
        assert main(["serve", str(packed / "bert"), "--http-port", str(http)]) == 2  # the port is taken
    finally:
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0
    assert (tmp_path / "errors").read_text() == ""  # that there is no GPU is no error
    assert hash_tree(packed / "bert") == before == content_hash(packed / "bert")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", http), timeout=1):
        pass


def test_a_changed_folder_is_not_served(packed, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(packed / "bert", folder)
    code = folder / "models" / "bert_answer" / "1" / "model.py"
    code.write_text(code.read_text() + "\nimport os\n")
    with pytest.raises(GateFailed, match="bert is not what pack left there"):
        serve.run(folder)
    write_json(folder / "artifact.json", read_artifact(folder) | {"content_sha256": hash_tree(folder)})
    assert serve.read_packed(folder)["kind"] == "packed"
    record = read_artifact(folder)
    record["about"] |= {"backend": "tensorrt"}
    write_json(folder / "artifact.json", record)
    with pytest.raises(UserError, match=r"for Triton's tensorrt backend[\s\S]*docker compose up"):
        serve.run(folder)
    (folder / "models" / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link is a symlink to /etc/passwd"):
        serve.run(folder)
    with pytest.raises(UserError, match="not there or not finished"):
        serve.run(tmp_path / "nothing")


def test_where_it_cannot_be_installed_the_container_is_named(environment, tmp_path, monkeypatch, capsys):
    """An environment of other versions would be replaced; it stays when the new one cannot be had."""
    serve.ensure_environment(environment, triton_image())
    assert capsys.readouterr().err == ""  # it is there already
    old = tmp_path / "environment" / "lmworks-triton.txt"
    old.parent.mkdir()
    old.write_text("nvidia-pytriton==0.6.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be installed here: ERROR[\s\S]*docker compose up[\s\S]*26.08-py3"):
        serve.ensure_environment(old.parent, triton_image())
    assert "installing nvidia-pytriton==0.7.0" in capsys.readouterr().err
    assert old.read_text() == "nvidia-pytriton==0.6.0\n" and list(tmp_path.iterdir()) == [old.parent]


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "requirements.txt").write_text("nvidia-pytriton==0.6.0\n")
    with pytest.raises(UserError, match="is there and no environment of ours"):
        serve.ensure_environment(tmp_path, triton_image())
    assert (tmp_path / "requirements.txt").is_file()


def test_ports_that_are_none_are_refused():
    with pytest.raises(UserError, match="70000 cannot be listened on"):
        serve._check_ports(serve.Endpoints("127.0.0.1", 70000, 8001, 8002))


def test_only_the_lack_of_a_gpu_is_kept_out_of_sight(tmp_path, capsys):
    harmless = [
        'E1127 10:52:54.766867 30566 server.cc:241] "CudaDriverHelper has not been initialized."\n',
        'W1127 10:53:04.676840 30566 pinned_memory_manager.cc:170] "failed to allocate pinned system memory: no pinned '
        'memory pool, falling back to non-pinned system memory"\n',
        'E1127 10:53:04.918756 30566 ensemble_scheduler.cc:1468] "unable to create stream for bert_text: CUDA driver '
        'version is insufficient for CUDA runtime version"\n',
    ]
    real = [
        "E1127 10:53:04.9 1 model_lifecycle.cc:642] failed to load 'bert' version 1: Internal: CUDA out of memory\n",
        'E1127 10:53:04.9 1 x.cc:1] "unable to create stream for bert_text: out of memory"\n',
        "Traceback (most recent call last):\n",
    ]
    serve._relay([harmless[0], real[0], *harmless[1:], *real[1:]], tmp_path / "server.log")
    assert capsys.readouterr().err == "".join(real)
    assert sorted((tmp_path / "server.log").read_text().splitlines(True)) == sorted([*harmless, *real])


def test_two_first_calls_make_one_environment(tmp_path, monkeypatch, capsys):
    made = []

    def install(folder, image):
        made.append(folder)
        time.sleep(1.0)
        (folder / "lib" / f"python{serve._python()}" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(serve, "_install", install)
    with ThreadPoolExecutor(2) as pool:
        sites = list(pool.map(lambda _: serve.ensure_environment(tmp_path / "there", "image"), range(2)))
    assert sites[0] == sites[1] and sites[0].is_dir() and len(made) == 1
    said = capsys.readouterr().err
    assert said.count("installing nvidia-pytriton") == 1
    assert said.count(f"waiting for another lmworks, which is installing into {tmp_path}") == 1


_SERVING = """
import sys
from pathlib import Path
from export import serve
from trainer.__main__ import main

serve.read_packed = lambda packed: {"about": {"image": "", "models": {"ensemble": "bert_text"}}}
serve.ensure_environment = lambda folder, image: Path(sys.argv[1])
serve.write_served = lambda packed, target: None
serve._check_ports = lambda endpoints: None
serve._command = lambda *words: ["sh", "-c", sys.argv[2]]
if sys.argv[3] != "starting":
    serve._wait_until_ready = lambda *words: None
raise SystemExit(main(["serve", "nowhere", "--http-port", sys.argv[4]]))
"""


@pytest.mark.parametrize("moment", ["starting", "ready", "ending"])
def test_signals_end_the_server_also_both_in_one_instant(moment, tmp_path):
    """Another program stands for the server, which takes a second to end. Both signals wait for a process that stands
    still, and come together when it goes on."""
    (tmp_path / "pytriton" / "tritonserver" / "backends" / "python").mkdir(parents=True)
    stub = tmp_path / "pytriton" / "tritonserver" / "python_backend_stubs" / serve._python()
    stub.mkdir(parents=True)
    (stub / "triton_python_backend_stub").touch()
    pid = tmp_path / "pid"
    server = f"trap 'sleep 1; exit 0' TERM; echo $$ > {pid}; while :; do sleep 0.1; done"
    command = [sys.executable, "-c", _SERVING, str(tmp_path), server, moment, str(free_ports()[0])]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    served = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if moment != "starting":
            assert "bert_text answers texts" in served.stdout.readline()
        while not pid.is_file() or not pid.read_text().strip():
            time.sleep(0.01)
        if moment == "ending":
            served.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            served.send_signal(number)
        said = served.communicate(timeout=60)[1]
    finally:
        served.kill()
    assert (served.returncode, said) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)

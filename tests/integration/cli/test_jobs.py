from api.db.tables.jobs import Job
from tests.servers import free_port

REPORT = {
    "bits_per_weight": 4.035,
    "promised_bits_per_weight": 4.035,
    "bytes_fp": 269_030_016,
    "bytes_quant": 110_244_096,
    "perplexity": {"fp": 20.82, "quant": 25.1, "tokens": 4092},
    "evaluation_status": "succeeded",
    "seconds": 153.2,
}


def test_a_list_shows_jobs_newest_first(abq, api):
    older, newer = api.queue_job(), api.queue_job(model="acme/other")

    jobs = abq("jobs", "list", "--json").json

    assert [job["id"] for job in jobs] == [newer.id, older.id]


def test_jobs_alone_is_json_for_a_program(abq, api):
    job = api.queue_job()

    assert [each["id"] for each in abq("jobs", "--json").json] == [job.id]


def test_a_long_list_is_read_page_by_page(abq, api):
    ids = [api.queue_job().id for _ in range(105)]

    jobs = abq("jobs", "list", "--limit", 103, "--json").json

    assert [job["id"] for job in jobs] == ids[::-1][:103]


def test_a_list_is_filtered_by_status_model_and_label(abq, api):
    wanted = api.queue_job(labels={"team": "a"})
    api.queue_job(labels={"team": "b"})
    api.queue_job(model="acme/other", labels={"team": "a"})

    filters = ("--status", "queued", "--model", "acme/tiny", "--label", "team=a")
    jobs = abq("jobs", "list", *filters, "--json").json

    assert [job["id"] for job in jobs] == [wanted.id]


def test_jobs_alone_is_a_table_for_a_person(abq, api):
    job = api.queue_job()

    answer = abq("jobs")

    assert job.id in answer.out
    assert "w4a8" in answer.out
    assert "queued" in answer.out


def test_an_empty_list_says_how_to_start(abq):
    assert "abq quantize" in abq("jobs", "list").out


def test_a_running_job_shows_stage_and_progress(abq, api):
    job = api.queue_job()
    lease = api.claim()
    api.record(lease, "stage.started", stage="calibrating")
    api.record(lease, "progress", stage="calibrating", done=3, total=30, unit="layers")

    shown = abq("jobs", "show", job.id).out

    assert "calibrating" in shown
    assert "3 of 30 layers" in shown


def test_layers_are_shown_with_both_losses(abq, api):
    job = api.queue_job()
    lease = api.claim()
    name = "model.layers.0"
    api.record(lease, "layer.started", index=0, total=2, name=name, bits={"q_proj": 4})
    losses = {"loss_before": 0.5, "loss_after": 0.25, "seconds": 1.5, "memory_bytes": 1000}
    api.record(lease, "layer.finished", index=0, total=2, name=name, resumed=False, **losses)

    shown = abq("jobs", "show", job.id, "--layers").out
    record = abq("jobs", "show", job.id, "--layers", "--json").json

    assert name in shown
    assert "-50 %" in shown
    assert [layer["loss_after"] for layer in record["layers"]] == [0.25]


def test_a_cancelled_job_can_be_retried(abq, api):
    job = api.queue_job()

    cancelled = abq("jobs", "cancel", job.id, "--json").json
    retried = abq("jobs", "retry", job.id, "--json").json

    assert cancelled["status"] == "cancelled"
    assert retried["id"] == job.id
    assert retried["status"] == "queued"


def test_an_unknown_job_is_one_line_and_exit_code_1(abq):
    answer = abq("jobs", "show", "job_unknown", "--json")

    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("abq: ")
    assert answer.err.count("\n") == 1


def test_a_label_without_a_value_is_refused_before_a_request(abq):
    answer = abq("jobs", "list", "--label", "team")

    assert answer.code == 1
    assert "write name=value" in answer.err


def test_a_missing_key_says_where_to_get_one(api, run):
    answer = run("--url", api.url, "jobs", "list")

    assert answer.code == 1
    assert "ABQ_API_KEY" in answer.err


def test_a_key_without_the_scope_says_how_to_get_one_with_it(api, run):
    key = api.key("quant:read")

    answer = run("--url", api.url, "--key", key, "keys", "list")

    assert answer.code == 1
    assert "abq keys create" in answer.err


def test_a_service_that_does_not_answer_is_one_line(run, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"

    answer = run("--url", url, "--data-dir", tmp_path, "jobs", "list")

    assert answer.code == 1
    assert f"no service answers at {url}" in answer.err
    assert answer.err.count("\n") == 1


def test_a_narrow_terminal_never_cuts_an_id(abq, api):
    job = api.queue_job(model="some-organization/a-model-with-quite-a-long-name")

    shown = abq("jobs", "list", columns=80).out

    assert job.id in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_result_that_could_not_be_pushed_says_why(abq, api):
    job = api.queue_job()
    api.finish(api.claim())
    refusal = {"code": "hub_token_rejected", "message": "the token was revoked"}
    with api.database.write() as session:
        session.get_one(Job, job.id).report = REPORT | {"publish_error": refusal}

    shown = abq("jobs", "show", job.id).out

    assert "4.035 bits per weight (promised 4.035)" in shown
    assert "20.82 -> 25.10" in shown
    assert "the token was revoked" in shown

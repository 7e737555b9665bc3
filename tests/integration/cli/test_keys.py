def test_a_created_key_works_until_it_is_revoked(abq, api, run):
    key = abq("keys", "create", "ci", "--scope", "quant:read", "--json").json

    before = run("--url", api.url, "--key", key["key"], "jobs", "list", "--json")
    abq("keys", "revoke", key["id"])
    after = run("--url", api.url, "--key", key["key"], "jobs", "list", "--json")

    assert before.json == []
    assert after.code == 1


def test_a_list_never_shows_a_whole_key(abq):
    key = abq("keys", "create", "ci", "--scope", "quant:read", "--days", 7, "--json").json

    listed = abq("keys", "list")

    assert key["id"] in listed.out
    assert key["key"] not in listed.out


def test_an_unknown_scope_is_refused_by_its_name(abq):
    answer = abq("keys", "create", "ci", "--scope", "everything")

    assert answer.code == 1
    assert "scopes" in answer.err

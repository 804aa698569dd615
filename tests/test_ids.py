"""The ids of the tests that run beside this one can be read."""

LONGEST = 64  # characters between the brackets


def test_ids_are_short(request):
    cases = {item: getattr(item, "callspec", None) for item in request.session.items}
    long = [
        item.nodeid for item, case in cases.items() if case and len(case.id) > LONGEST
    ]
    assert not long, "give them shorter `ids=`"

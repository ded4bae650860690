"""Shares of open files and listings: each user leaves as many for others as he has."""

from __future__ import annotations

import errno

import pytest

from cowfs.fuse.quotas import Quota

USER, OTHER = 1000, 1001


def claims(quota: Quota, uid: int) -> int:
    """Return how many more a user gets before EMFILE."""
    count = 0
    with pytest.raises(OSError) as caught:
        while True:
            quota.claim(uid)
            count += 1
    assert caught.value.errno == errno.EMFILE
    return count


def test_who_mounts_for_himself_gets_all() -> None:
    quota = Quota(3, shared=False)
    assert claims(quota, USER) == 3
    quota.give_back(USER)
    assert claims(quota, USER) == 1


def test_each_user_leaves_as_much_as_he_has_and_an_eighth_for_root() -> None:
    quota = Quota(64, shared=True)
    assert claims(quota, USER) == 28  # half of what is not root's
    assert claims(quota, OTHER) == 14
    quota.give_back(USER)
    assert claims(quota, OTHER) == 1
    assert claims(quota, USER) == 0
    assert claims(quota, 0) == 22

"""Names of members are understood as webdataset understands them."""

from maskalign.data.format.members import split_name


def test_member_names_are_split_as_webdataset_does():
    from webdataset.tariterators import base_plus_ext

    for name in ("00000001.cls", "a/b/c.flip.net.npy", "x.y/z.png", "d/00.jpg", "ends.", "noending", "x.y/z"):
        assert split_name(name) == base_plus_ext(name), name
        expected = tuple(part if part is None else part.encode() for part in base_plus_ext(name))
        assert split_name(name.encode()) == expected, name


def test_a_hidden_file_has_no_key():
    assert split_name("a/.hidden.png") == split_name(b".png") == (None, None)

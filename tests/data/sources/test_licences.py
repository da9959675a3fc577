from omni_adapter.data.sources import SOURCES, SourceSpec, licences


def test_a_mixture_names_what_is_public_of_it(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    specs = [
        SourceSpec("librispeech:train.clean.100"),
        SourceSpec("librispeech"),
        SourceSpec(str(own), recipe="voiceassistant-400k:identity"),
        SourceSpec(str(own)),
        SourceSpec(str(own / "*.parquet")),
        SourceSpec(str(own), recipe="audio-text"),
        SourceSpec(str(own), recipe="ljspeech"),
        SourceSpec("someone/speech"),
    ]
    assert licences(specs) == {
        SOURCES["librispeech"].hub_id: "cc-by-4.0",
        SOURCES["voiceassistant-400k"].hub_id: SOURCES["voiceassistant-400k"].licence,
        SOURCES["ljspeech"].hub_id or "ljspeech": "public domain",
        "someone/speech": "see its card",
    }

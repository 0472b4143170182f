"""The tables of the ablations compare with the defaults, which are measured once."""

from sefi_ide.benchmarks import ablations


def test_the_defaults_of_an_ablation_are_measured_once():
    tables = ablations.TABLES
    same = [v for part in tables.values() for v in part.values() if v]
    same = [v for v in same if ablations.jobs_of(v) == ablations.jobs_of({})]
    assert {"attention_weight": 0.003} in same and {"levels": [2, 4]} in same
    assert {"attention_weight": 0.0} not in same and {"photos": 2} not in same
    done = {
        job.key: dict.fromkeys(ablations.FIGURES, 0.5) | {"id_p": base + shift}
        for variant, base in (({}, 0.5), ({"captions": ()}, 0.4))
        for job, shift in zip(ablations.jobs_of(variant, 16), range(16), strict=True)
    }
    lines = ablations.table("captions", done)
    assert lines[1].startswith("16 identities. Measured at ")
    assert lines[-2].endswith("| 0.100 [0.100, 0.100] |") and lines[-1].endswith("|  |")

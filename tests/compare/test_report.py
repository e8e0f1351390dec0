"""The report: the paper's table, what is left out of it, and the page over several seeds."""

import json
import re
import shutil
import statistics

import pytest

from training import cli, runs
from training.compare import comparison
from training.plots import plot_gradient_norms, plot_heat_maps, plot_overview
from training.recipe import build_recipe
from training.train import loop

from ..conftest import PAPERS_VARIANTS
from .test_seeds import fake_run


pytestmark = pytest.mark.usefixtures("own_cache")


def test_report_has_the_papers_table(variant_runs, capsys):
    assert cli.main(["compare", str(variant_runs)]) == 0
    report = (variant_runs / "report" / "report.md").read_text()
    assert f"report: {variant_runs / 'report' / 'report.md'}" in capsys.readouterr().out
    results = {variant: runs.read_results(variant_runs / variant) for variant in PAPERS_VARIANTS}
    rows = [line for line in report.splitlines() if line.startswith("| SM+")]
    assert [row.split(" | ")[0][2:] for row in rows[:5]] == [*PAPERS_VARIANTS, "SM+LR-layer"]
    for variant, row in zip(PAPERS_VARIANTS, rows, strict=False):
        change = 100 * (results[variant]["perplexity"] / results["SM+LN+G"]["perplexity"] - 1)
        assert f"| {results[variant]['perplexity']:.3f} | {change:+.2f} % |" in row
    headline = 100 * (results["SM+R"]["perplexity"] / results["SM+G"]["perplexity"] - 1)
    assert f"SM+R against SM+G, paired over 1 seed: {headline:+.2f} % perplexity (seed 1337 " in report
    written = json.loads((variant_runs / "report" / "comparison.json").read_text())
    assert written["groups"][0]["summary"]["pairs"][0]["change"]["by_seed"] == {"1337": pytest.approx(headline)}
    for row in written["groups"][0]["rows"]:
        assert sum(row["head_distribution"]) == pytest.approx(1)
        entropy = results.get(row["variant"], runs.read_results(variant_runs / row["variant"]))["attention_entropy"]
        cost = row["private_cost"]["forward"]["total"]
        assert sum(cost["layer_norm"]["rows"].values()) == 16 * (5 if "LN" in row["variant"] else 1)
        assert row["private_cost"]["baseline"]["total"]["gelu"]["elements"] == 2 * 16 * 64
        assert row["entropy_by_layer"] == pytest.approx([sum(heads) / 2 for heads in entropy["entropy"]])
    points = written["groups"][0]["seconds"]
    assert {point["configuration"] for point in points} == {*PAPERS_VARIANTS, "SM+LR-layer"}
    for point in points:
        (cost,) = [
            row["private_cost"]["forward"]["estimates"]["SEMI2K"]
            for row in written["groups"][0]["rows"]
            if row["variant"] == point["configuration"]
        ]
        for network, latency, bandwidth in (("LAN", 0.8e-3, 3e9), ("WAN", 80e-3, 0.2e9)):
            seconds = cost["rounds"] * latency + cost["bytes_per_party"] * 8 / bandwidth
            assert point["seconds"][network] == pytest.approx(seconds)
            better = [
                other["configuration"]
                for other in points
                if other["perplexity"] < point["perplexity"] and other["seconds"][network] < point["seconds"][network]
            ]
            assert point["frontier"][network] == (better == [])
        assert f"| {point['configuration']} | {point['perplexity']:.3f} | " in report
    for picture in ("heat_maps.png", "curves.png", "seconds.png"):
        assert (variant_runs / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_report_leaves_out_what_is_not_finished(variant_runs, tmp_path, capsys):
    (tmp_path / "SM+R").symlink_to(variant_runs / "SM+R")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe.yaml").write_text("variant: SM+G")
    assert cli.main(["compare", str(tmp_path), "--output", str(tmp_path / "elsewhere")]) == 0
    assert "Not finished, and left out: half." in (tmp_path / "elsewhere" / "report.md").read_text()
    (tmp_path / "SM+R").unlink()
    assert cli.main(["compare", str(tmp_path)]) == 1
    assert "no finished run in" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "missing")]) == 1
    assert f"{tmp_path / 'missing'} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log_history.json", "attention_entropy.jsonl", "model/config.json"])
def test_report_names_a_file_of_a_run_that_cannot_be_read(variant_runs, tmp_path, capsys, name):
    run_dir = tmp_path / "run"
    shutil.copytree(variant_runs / "SM+R", run_dir)
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(run_dir / name)
        assert cli.main(["compare", str(tmp_path)]) == 1
        assert f"lnfree compare: error: {run_dir / name} cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("in_the_way", ["out", "out/curves.png/x"])
def test_report_that_cannot_be_written_is_printed(in_the_way, variant_runs, tmp_path, capsys):
    (tmp_path / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / in_the_way).write_text("")
    assert cli.main(["compare", str(variant_runs), "--output", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert "| SM+LN+G | 1337 |" in output.out
    assert re.fullmatch(r"lnfree compare: error: output=.*out cannot be written: .*\n", output.err)
    # and nothing half-written
    assert not list(tmp_path.rglob("*.aside"))


def test_report_over_seeds_is_one_page_without_a_network(recipe_values, tmp_path, capsys, monkeypatch):
    variants = ["SM+G", "SM+R"]
    settings = [{"variant": variant, "seed": seed} for seed in (1, 2, 3) for variant in variants]
    settings += [{"variant": "SM+LR-layer", "decay_slopes": decay} for decay in (True, False)]
    settings += [{"variant": "SM+R", "initializer_range": 0.2}]
    for index, setting in enumerate(settings):
        values = {
            **recipe_values,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            **setting,
        }
        loop.train(build_recipe({**values, "output_dir": str(tmp_path / str(index))}))
    drawn = []
    monkeypatch.setattr(comparison, "plot_heat_maps", lambda *args: drawn.append(args[1]) or plot_heat_maps(*args))
    overview = []
    monkeypatch.setattr(
        comparison, "plot_overview", lambda *args: overview.append((args[1], args[2])) or plot_overview(*args)
    )
    assert cli.main(["compare", str(tmp_path)]) == 0
    # the runs of the first seed
    [(names, bars)] = overview
    first = [runs.read_results(tmp_path / str(index)) for index in (0, 1)]
    assert names == variants and bars["perplexity"] == [result["perplexity"] for result in first]
    assert [bars[f"values in {what}"] for what in ("LayerNorms", "GELUs")] == [[16 * 16] * 2, [2 * 16 * 64, 0]]
    # no two panels of the one picture look the same
    assert len(drawn[0]) == len(set(drawn[0])) == 9 and drawn[0][-1].endswith("seed 1337\ninitializer_range=0.2")
    assert str(tmp_path / "report" / "report.html") in capsys.readouterr().out
    written = json.loads((tmp_path / "report" / "comparison.json").read_text())
    titles = [group["title"].split("tokens, ")[1] for group in written["groups"]]
    assert titles == ["initializer_range=0.1", "initializer_range=0.2"]
    rows = {row["configuration"]: row for row in written["groups"][0]["summary"]["configurations"]}
    assert list(rows) == [*variants, "SM+LR-layer", "SM+LR-layer, slopes decayed"]
    for variant in variants:
        measured = [
            runs.read_results(tmp_path / str(i))["perplexity"] for i in range(6) if i % 2 == variants.index(variant)
        ]
        assert rows[variant]["perplexity"] == pytest.approx(statistics.geometric_mean(measured))
        assert rows[variant]["seeds"] == [1, 2, 3]
    markdown = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    for text in (
        f"| SM+R | 3 | {rows['SM+R']['perplexity']:.3f} |",
        "SM+R against SM+G, paired over 3 seeds: ",
        "SM+LR-layer, slopes decayed, seed 1337: negative slopes from 0.0100, 0.0100 to ",
    ):
        assert text in markdown, text
    assert "negative slopes from 0.0100, 0.0100 to " in page and f"<td>{rows['SM+R']['perplexity']:.3f}</td>" in page
    cost = page.split("<h3>Under encryption</h3>")[1].split("</table>")[0]
    heads, *rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in cost.split("<tr>")[1:]]
    assert dict(zip(heads, rows[1], strict=True))["configuration"] == "SM+R" and "ReLU" in heads
    # all that the page needs is in it
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page and "@import" not in page
    assert page.count('src="data:image/png;base64,') == 9 + 8


def test_logarithmic_axes_have_plain_numbers(tmp_path):
    runs = [fake_run(tmp_path, "SM+R", 1, 10.0)]
    (runs[0].folder / "gradient_norm.jsonl").write_text(json.dumps({"norms": [0.35] * 10 + [0.65] * 10}))
    figure = plot_gradient_norms(runs)
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    labels = [label.get_text() for label in axis.get_ticklabels() + axis.get_ticklabels(minor=True)]
    assert {"0.4", "0.5", "0.6"} <= set(labels) and not any("e" in label for label in labels)


def test_titles_name_what_differs_among_settings_of_one_length(variant_runs, tmp_path):
    """Two rates at one length, and at another length a third, from which nothing need be told."""
    for name, block_size, rate in (("one", 16, 0.01), ("two", 16, 0.02), ("short", 8, 0.03)):
        run = shutil.copytree(variant_runs / "SM+R", tmp_path / name)
        results = json.loads((run / "results.json").read_text())
        results |= {"block_size": block_size, "recipe": {**results["recipe"], "learning_rate": rate}}
        (run / "results.json").write_text(json.dumps(results))
    assert cli.main(["compare", str(tmp_path)]) == 0
    groups = json.loads((tmp_path / "report" / "comparison.json").read_text())["groups"]
    titles = {group["title"].partition(" training tokens")[2] for group in groups if group["block_size"] == 16}
    assert titles == {", learning_rate=0.01", ", learning_rate=0.02"}
    [short] = [group["title"] for group in groups if group["block_size"] == 8]
    assert short.startswith("gpt2, T=8, ") and short.endswith(" training tokens")

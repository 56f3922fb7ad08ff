# SPDX-License-Identifier: Apache-2.0
"""What a browser makes of the HTML report: pictures, controls, phone, print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import (
    HEIGHT,
    IMAGE,
    LAYERS,
    MASKS,
    RATERS,
    WIDTH,
    N,
    Open,
    R,
    blobs,
    colors,
    data_of,
    layers,
    png,
    press,
    rgb,
    slide,
    status,
)

from berdiff_fast.imaging import encoding, windows

#: IMAGE in its default window, and its first slice in that of its own.
GREY = encoding.grey(IMAGE, *windows.percentile(IMAGE))
GREY_OF_FIRST = encoding.grey(IMAGE[0], *windows.percentile(IMAGE[0]))


class TestPictures:
    def test_a_sample_is_filled_where_its_mask_is(self, show: Open) -> None:
        page = show()
        page.locator("#smooth").click()
        slide(page, "opacity", 100)
        slide(page, "slice", 2)
        slide(page, "sample", 3)
        layers(page, "sample")
        filled = colors(page)
        mask, color = MASKS[3, 2], rgb(encoding.color(3))
        assert (filled[mask] == color).all()
        shown = GREY[2]
        assert (filled[~mask] == shown[~mask][:, None]).all()
        layers(page)
        assert (colors(page) == shown[..., None]).all()

    def test_contours_run_along_pixel_edges(self, show: Open) -> None:
        page = show(IMAGE[0], MASKS[:1, 0])
        page.locator("#smooth").click()
        layers(page, "contours")
        mask, color = MASKS[0, 0], np.array(rgb(encoding.color(0)))
        assert (colors(page) == GREY_OF_FIRST[..., None]).all()  # centres are free
        edge = mask[:, 1:] != mask[:, :-1]
        on_edge = (colors(page, right=1.0)[:, :-1] == color).all(-1)
        assert edge.any() and (on_edge == edge).all()
        edge = mask[1:] != mask[:-1]
        on_edge = (colors(page, down=1.0)[:-1] == color).all(-1)
        assert edge.any() and (on_edge == edge).all()

    def test_maps_have_the_colours_of_the_legend(self, show: Open) -> None:
        masks = np.zeros((4, HEIGHT, WIDTH), bool)
        for k in range(4):
            masks[k, :, : 4 * (k + 1)] = True  # 4, 3, 2, 1, 0 of 4 in columns of 4
        page = show(IMAGE[0], masks)
        page.locator("#smooth").click()
        slide(page, "opacity", 100)
        layers(page, "mean")
        shares = colors(page)
        stops = [rgb(color) for color in encoding.RAMPS["mean"]]
        for column, stop in zip((0, 4, 8, 12), (4, 3, 2, 1), strict=True):
            assert (shares[:, column] == stops[stop]).all()
        shown = GREY_OF_FIRST
        assert (shares[:, 16:] == shown[:, 16:, None]).all()
        layers(page, "disagreement")
        bits = colors(page)
        stops = [rgb(color) for color in encoding.RAMPS["disagreement"]]
        at = 4 * (2 - 0.75 * np.log2(3))  # of 1/4, between the third and fourth stop
        quarter = np.array(stops[3]) + (at - 3) * (np.array(stops[4]) - stops[3])
        assert (bits[:, 8] == stops[4]).all() and (bits[:, 0] == shown[:, 0, None]).all()
        assert np.abs(bits[:, 4] - quarter).max() <= 1 and (bits[:, 4] == bits[0, 12]).all()

    def test_the_white_line_surrounds_what_more_than_half_mark(self, show: Open) -> None:
        masks = np.zeros((4, HEIGHT, WIDTH), bool)
        for k in range(4):
            masks[k, :, : 4 * (k + 1)] = True
        page = show(IMAGE[0], masks)
        layers(page, "contours")
        white = (colors(page, right=1.0)[1:-1] == 255).all((0, 2))
        assert np.flatnonzero(white).tolist() == [7]  # three of four on its left, two on its right

    def test_every_layer_changes_the_picture(self, show: Open) -> None:
        page = show(raters=RATERS)
        pictures = []
        for names in [(), *((name,) for name in LAYERS)]:
            layers(page, *names)
            pictures.append(page.evaluate("document.getElementById('canvas').toDataURL()"))
        assert len(set(pictures)) == 6

    def test_zoom_shows_what_is_marked(self, show: Open) -> None:
        masks = np.zeros((1, HEIGHT, WIDTH), bool)
        masks[0, 10:13, 8:11] = True
        page = show(IMAGE[0], masks)
        slide(page, "opacity", 100)
        layers(page, "sample")

        def share() -> float:
            return float((colors(page, height=200, width=200) == rgb(encoding.color(0))).all(-1).mean())

        assert share() == pytest.approx(9 / (HEIGHT * WIDTH), rel=0.1)
        press(page, "z")
        assert page.locator("#zoom").get_attribute("aria-pressed") == "true"
        assert 4 * 9 / (HEIGHT * WIDTH) < share() < 0.6
        press(page, "z")
        assert share() == pytest.approx(9 / (HEIGHT * WIDTH), rel=0.1)

    def test_pixels_keep_their_proportions(self, show: Open) -> None:
        box = show(spacing=(5, 1.2, 0.8)).locator("#canvas").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(WIDTH * 0.8 / (HEIGHT * 1.2), rel=0.01)

    def test_areas_in_words(self, show: Open) -> None:
        page = show(spacing=(1.23, 3.21))
        pixels = MASKS[0, int(MASKS.sum((0, 2, 3)).argmax())].sum()
        assert f"sample 0 of 0–4: {pixels * 1.23 * 3.21:.1f} mm² here." in status(page)


class TestControls:
    def test_keys(self, show: Open) -> None:
        page = show(raters=RATERS)
        start = data_of(Path(page.url.removeprefix("file://")))["slices"]
        first = int(MASKS.sum((0, 2, 3)).argmax())
        assert status(page).startswith(f"Slice {first} of 0–2, sample 0 of 0–4: {MASKS[0, first].sum()} px here.")
        assert start == [0, 1, 2]
        slide(page, "slice", 0)
        for key, words in [
            ("ArrowUp", "Slice 1 of 0–2, sample 0"),
            ("PageUp", "Slice 2 of 0–2, sample 0"),
            ("ArrowUp", "Slice 2 of 0–2, sample 0"),
            ("ArrowRight", "Slice 2 of 0–2, sample 1"),
            ("PageDown", "Slice 1 of 0–2, sample 1"),
            ("ArrowDown", "Slice 0 of 0–2, sample 1"),
            ("ArrowLeft", "Slice 0 of 0–2, sample 0"),
            ("ArrowLeft", "Slice 0 of 0–2, sample 0"),
        ]:
            page.locator("#canvas").focus()
            press(page, key)
            assert status(page).startswith(words), key

    def test_layer_keys_and_one_map_at_a_time(self, show: Open) -> None:
        page = show(raters=RATERS)

        def on() -> str:
            return "".join(str(i + 1) for i, name in enumerate(LAYERS) if page.locator(f"#layer-{name}").is_checked())

        assert on() == "15"
        for key, wanted in [("2", "125"), ("3", "1235"), ("4", "1245"), ("1", "245"), ("5", "24"), ("3", "23")]:
            press(page, key)
            assert on() == wanted
        page.keyboard.press("Control+2")
        assert on() == "23"

    def test_sliders_announce_and_keep_their_own_arrows(self, show: Open) -> None:
        page = show()
        before = colors(page)
        slide(page, "sample", 3)
        mask = MASKS[3]
        index = int(MASKS.sum((0, 2, 3)).argmax())
        assert f"sample 3 of 0–4: {mask[index].sum()} px here. 4 of 5 samples mark" in status(page)
        assert (colors(page, right=1.0) != before).any()
        slide(page, "slice", 1)
        assert status(page).startswith(f"Slice 1 of 0–2, sample 3 of 0–4: {mask[1].sum()} px")
        assert page.locator("#slice").get_attribute("aria-valuetext") == "Slice 1 of 0–2"
        page.locator("#opacity").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#opacity-value").inner_text() == "65 %"
        assert "sample 3" in status(page)
        page.locator("#sizes [data-sample='1']").click()
        assert "sample 1 of 0–4" in status(page)
        assert page.locator("#sizes tr[aria-current] th").inner_text().strip() == "Sample 1"

    def test_help_and_names(self, show: Open) -> None:
        page = show(raters=RATERS)
        assert not page.locator("#help").is_visible()
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        assert page.locator("#keys").get_attribute("aria-expanded") == "true"
        nameless = page.evaluate(
            """[...document.querySelectorAll("input, button, canvas#canvas, [tabindex]")].filter((e) =>
                !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).length"""
        )
        assert nameless == 0
        assert page.locator("#status").get_attribute("aria-live") == "polite"

    def test_tab_reaches_every_control_and_shows_where_it_is(self, show: Open) -> None:
        page = show(raters=RATERS)
        reached = set()
        for _ in range(14):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
            reached.add(name)
            assert outline not in ("none", "")
        assert {
            "canvas",
            "slice",
            "sample",
            "opacity",
            "zoom",
            "smooth",
            "keys",
            *(f"layer-{x}" for x in LAYERS),
        } <= reached

    def test_the_pointer_reads_votes(self, show: Open) -> None:
        page = show(raters=RATERS)
        slide(page, "slice", 0)
        box = page.locator("#canvas").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 7.5 / WIDTH, box["y"] + box["height"] * 9.5 / HEIGHT)
        votes, rated = MASKS[:, 0, 9, 7].sum(), RATERS[:, 0, 9, 7].sum()
        p = votes / N
        bits = 0 if p in (0, 1) else -p * np.log2(p) - (1 - p) * np.log2(1 - p)
        wanted = f"Row 9, column 7: in {votes} of 5 samples, {bits:.2f} bits, in {rated} of 2 raters"
        assert page.locator("#readout").inner_text() == wanted

    def test_one_slice_one_sample_no_raters(self, show: Open) -> None:
        page = show(IMAGE[0], MASKS[:1, 0])
        assert not page.locator("#slice").is_visible() and not page.locator("#layer-raters").is_visible()
        press(page, "5", "ArrowUp", "ArrowRight")
        assert status(page).startswith(f"Slice 0, sample 0: {MASKS[0, 0].sum()} px here. 1 of 1 sample marks")

    def test_nothing_marked(self, show: Open) -> None:
        page = show(IMAGE, MASKS & False, raters=RATERS & False)
        press(page, "2", "3", "z", "ArrowUp")
        assert "0 px here. 0 of 5 samples mark" in status(page) and not page.locator("#zoom").is_enabled()
        assert "5 of 5 mark nothing" in page.locator("#summary").inner_text()

    def test_many(self, show: Open) -> None:
        page = show(np.zeros((100, HEIGHT, WIDTH)), np.tile(blobs(10, 3, 10), (10, 10, 1, 1)))
        slide(page, "slice", 99)
        slide(page, "sample", 99)
        assert status(page).startswith("Slice 99 of 0–99, sample 99 of 0–99")
        press(page, "3", "z")


class TestPage:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_phone_needs_no_sideways_scrolling(self, show: Open, scheme: str) -> None:
        provenance = {"weights": "sha256:" + "0123456789abcdef" * 8, "a-very-long-name-" * 5: 1}
        phone = {
            "viewport": {"width": 360, "height": 740},
            "is_mobile": True,
            "has_touch": True,
            "color_scheme": scheme,
        }
        page = show(raters=RATERS, spacing=(2, 1, 1), title="Title" * 30, provenance=provenance, context=phone)
        page.locator("#keys").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator("#canvas").bounding_box()["width"] > 300
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) > 382) == (scheme == "light")

    def test_print_shows_pictures_and_tables_instead_of_controls(self, show: Open) -> None:
        page = show(raters=RATERS, provenance={"seed": 7})
        press(page, "ArrowRight")
        assert not page.locator("#contact").is_visible()
        page.emulate_media(media="print")
        page.wait_for_function("() => [...document.querySelectorAll('#contact canvas')].every((c) => c.dataset.shows)")
        for hidden in ("input", "#zoom", "#canvas", "#status"):
            assert not page.locator(hidden).first.is_visible()
        for shown in ("#sizes", "#provenance", "#ged", "#summary", ".notice"):
            assert page.locator(shown).is_visible()
        pictures = page.evaluate("[...document.querySelectorAll('#contact canvas')].map((c) => c.toDataURL())")
        assert len(set(pictures)) == 4 and all(png(uri).std() > 10 for uri in pictures)
        assert (
            page.locator("[data-caption]")
            .inner_text()
            .startswith(status_slice(page) + "; window 0.5 to 99.5 percentile")
        )
        page.emulate_media(media="screen")
        assert page.locator("#canvas").is_visible() and not page.locator("#contact").is_visible()

    def test_without_scripts_there_are_pictures_and_numbers(self, show: Open) -> None:
        page = show(raters=RATERS, context={"java_script_enabled": False})
        pictures = [png(uri) for uri in page.locator(".stills img").evaluate_all("all => all.map((i) => i.src)")]
        s = int(MASKS.sum((0, 2, 3)).argmax())
        votes = MASKS[:, s].sum(0)
        assert (pictures[0] == GREY[s]).all()
        coloured = pictures[1].max(-1) != pictures[1].min(-1)
        assert (coloured == (votes > 0)).all()
        assert ((pictures[2].max(-1) != pictures[2].min(-1)) == ((votes > 0) & (votes < N))).all()
        assert not page.locator("#viewer").is_visible() and page.locator(".stills img").first.is_visible()
        assert page.locator("#sizes tbody tr").count() == N + R

    def test_what_it_is_given_is_text_and_never_runs(self, show: Open) -> None:
        evil = "</title></script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}&amp;"
        page = show(title=evil, unit=evil, provenance={evil: evil, "nested": {"x": [evil]}})
        assert page.locator("h1").inner_text() == evil and page.title() == evil
        assert page.locator("#provenance th").first.inner_text() == evil
        assert page.locator("#provenance td").first.inner_text() == evil
        assert evil in status(page)
        assert page.locator("script").count() == 2 and page.locator("img").count() == 0

    def test_the_policy_stops_scripts_that_are_not_its_own(self, show: Open, tmp_path: Path) -> None:
        page = show()
        text = (tmp_path / "report.html").read_text("utf-8")
        other = tmp_path / "other.html"
        other.write_text(text.replace("</body>", "<script>document.title = 'ran'</script></body>"), "utf-8")
        stray = page.context.new_page()
        stray.goto(other.as_uri())
        assert stray.title() == "Plausible masks"

    def test_says_that_it_is_no_medical_device(self, show: Open) -> None:
        notice = show().locator(".notice")
        assert notice.is_visible() and notice.inner_text() == "Not a medical device"


def status_slice(page: Any) -> str:
    return page.evaluate("document.getElementById('status').textContent.split(',')[0]")

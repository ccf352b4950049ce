//! `heddle plot`: a recording as a picture. icount against host time, in which a warp is
//! a plateau, and below it the events as lanes by kind, coloured by role.

use super::recordings;
use crate::args::Plot;
use crate::cluster::Cluster;
use crate::exit::{NOTHING, OK, USAGE, coded};
use anyhow::{Context, Result};
use heddle_proto::event::KIND_NAMES;
use heddle_proto::{Body, ClockKind, Event, Role};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

const WIDTH: f64 = 1100.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 60.0;
const CURVE: f64 = 300.0;
const LANE: f64 = 18.0;
/// Columns of the lanes: finer than this nobody sees.
const COLUMNS: usize = 880;
const COLOURS: [(&str, &str); 2] = [("vcpu", "#1f6feb"), ("iothread", "#d1602a")];

/// Draws a recording.
pub async fn run(cluster: &Cluster, command: Plot) -> Result<u8> {
    let extension = command.out.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !["svg", "png"].contains(&extension) {
        return Err(coded(USAGE, format!("{}: .svg or .png can be drawn", command.out.display())));
    }
    let recording = recordings::find(&cluster.store, &command.recording).await?;
    let events = recordings::events(&cluster.store, recording.id()).await?;
    if events.is_empty() {
        return Err(coded(NOTHING, "the recording has no events"));
    }
    let snapshots: Vec<u64> = recording.row.snapshots.iter().map(|snapshot| snapshot.icount).collect();
    let svg = draw(&recording.manifest.name, &events, &snapshots);
    write(&command.out, extension, &svg)?;
    eprintln!("drew {} events to {}", events.len(), command.out.display());
    Ok(OK)
}

fn write(path: &Path, extension: &str, svg: &str) -> Result<()> {
    let bytes = if extension == "png" { png(svg)? } else { svg.as_bytes().to_vec() };
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = resvg::usvg::Options::default();
    options.fontdb_mut().load_system_fonts();
    let tree = resvg::usvg::Tree::from_str(svg, &options).context("read the picture")?;
    let size = tree.size().to_int_size();
    let mut pixels =
        resvg::tiny_skia::Pixmap::new(size.width(), size.height()).context("make the picture")?;
    resvg::render(&tree, resvg::tiny_skia::Transform::default(), &mut pixels.as_mut());
    pixels.encode_png().context("encode the picture")
}

/// Host time of every event, in nanoseconds from the first: reads of the host's clock, and
/// between two of them as the instructions pass.
fn times(events: &[Event]) -> Vec<f64> {
    let mut known: Vec<(usize, f64)> = vec![];
    for (at, event) in events.iter().enumerate() {
        if let Body::Clock { clock: ClockKind::Host, value } = event.body
            && known.last().is_none_or(|(_, last)| value as f64 >= *last)
        {
            known.push((at, value as f64));
        }
    }
    let Some((_, first)) = known.first().copied() else {
        return events.iter().map(|event| event.icount as f64).collect();
    };
    let mut out = vec![0.0; events.len()];
    for pair in known.windows(2) {
        let ((from, start), (to, end)) = (pair[0], pair[1]);
        let span = (events[to].icount - events[from].icount).max(1) as f64;
        for at in from..to {
            let part = (events[at].icount - events[from].icount) as f64 / span;
            out[at] = start - first + part * (end - start);
        }
    }
    if let Some((from, last)) = known.last() {
        out[*from..].fill(last - first);
    }
    out
}

fn draw(name: &str, events: &[Event], snapshots: &[u64]) -> String {
    let times = times(events);
    let (span, most) = (
        times.last().copied().unwrap_or(0.0).max(1.0),
        events.last().map_or(0, |event| event.icount).max(1) as f64,
    );
    let x = |time: f64| LEFT + time / span * (WIDTH - LEFT - RIGHT);
    let y = |icount: u64| TOP + CURVE - icount as f64 / most * CURVE;
    let mut lanes: BTreeMap<u8, [Vec<u32>; 2]> = BTreeMap::new();
    for (event, time) in events.iter().zip(&times) {
        let column = ((time / span * COLUMNS as f64) as usize).min(COLUMNS - 1);
        let lane = lanes.entry(event.body.code()).or_insert_with(|| [vec![0; COLUMNS], vec![0; COLUMNS]]);
        lane[usize::from(event.role == Role::Iothread)][column] += 1;
    }
    let height = TOP + CURVE + 60.0 + lanes.len() as f64 * LANE + 20.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let text = |out: &mut String, x: f64, y: f64, anchor: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#24292f\">{text}</text>"
        );
    };
    text(&mut out, LEFT, 24.0, "start", &format!("{name}: instructions against host time"));
    for (at, (role, colour)) in COLOURS.iter().enumerate() {
        let left = WIDTH - RIGHT - 180.0 + at as f64 * 90.0;
        let _ = writeln!(out, "<rect x=\"{left}\" y=\"14\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        text(&mut out, left + 17.0, 24.0, "start", role);
    }
    for part in 0..=4 {
        let (at, level) = (f64::from(part) / 4.0, TOP + CURVE * (1.0 - f64::from(part) / 4.0));
        let (end, down) = (WIDTH - RIGHT, TOP + CURVE);
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {level:.1}H{end}M{:.1} {TOP}V{down}\" stroke=\"#d8dee4\" fill=\"none\"/>",
            x(at * span)
        );
        text(&mut out, LEFT - 8.0, level + 4.0, "end", &format!("{:.1} M", at * most / 1e6));
        text(&mut out, x(at * span), down + 18.0, "middle", &format!("{:.2} s", at * span / 1e9));
    }
    for icount in snapshots {
        let at = events.partition_point(|event| event.icount < *icount).min(events.len() - 1);
        let _ = writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"#2da44e\"/>",
            x(times[at]),
            y(*icount)
        );
    }
    let _ = writeln!(
        out,
        "<polyline fill=\"none\" stroke=\"#24292f\" stroke-width=\"1.6\" points=\"{}\"/>",
        curve(events, &times, x, y)
    );
    text(
        &mut out,
        LEFT,
        TOP + CURVE + 42.0,
        "start",
        "events, by kind (a plateau above is a warp: every vCPU sleeps; green: snapshots)",
    );
    for (row, (code, roles)) in lanes.iter().enumerate() {
        let level = TOP + CURVE + 58.0 + row as f64 * LANE;
        let count: u64 = roles.iter().flatten().map(|count| u64::from(*count)).sum();
        let name = KIND_NAMES.get(usize::from(*code)).unwrap_or(&"unknown");
        text(&mut out, LEFT - 8.0, level + 11.0, "end", &format!("{name}  {count}"));
        for (role, columns) in roles.iter().enumerate() {
            let top = level + 1.0 + role as f64 * 7.0;
            let mut path = String::new();
            for (column, _) in columns.iter().enumerate().filter(|(_, count)| **count > 0) {
                let left = x(column as f64 / COLUMNS as f64 * span);
                let _ = write!(path, "M{left:.1} {top:.1}v6");
            }
            if !path.is_empty() {
                let colour = COLOURS[role].1;
                let _ = writeln!(out, "<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"1.2\"/>");
            }
        }
    }
    out.push_str("</svg>\n");
    out
}

/// The curve's points: one a column and height, not one an event.
fn curve(events: &[Event], times: &[f64], x: impl Fn(f64) -> f64, y: impl Fn(u64) -> f64) -> String {
    let mut points = String::new();
    let mut last = (i64::MIN, i64::MIN);
    for (event, time) in events.iter().zip(times) {
        let point = (x(*time), y(event.icount));
        let rounded = ((point.0 * 2.0) as i64, (point.1 * 2.0) as i64);
        if rounded != last {
            let _ = write!(points, "{:.1},{:.1} ", point.0, point.1);
            last = rounded;
        }
    }
    points
}

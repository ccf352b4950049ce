//! `heddle diff`: two logs side by side, without a replay.

use super::recordings::{self, Recording};
use crate::args::{Diff, Format};
use crate::cluster::Cluster;
use crate::exit::{DIVERGED, OK};
use crate::output;
use anyhow::Result;
use heddle_proto::{Body, Event};
use serde_json::{Value, json};

/// Compares; exit 0 if the logs are equal, 3 if not.
pub async fn run(cluster: &Cluster, command: Diff, format: Format) -> Result<u8> {
    let (a, b) = (
        recordings::find(&cluster.store, &command.a).await?,
        recordings::find(&cluster.store, &command.b).await?,
    );
    let events_a = recordings::events(&cluster.store, a.id()).await?;
    let events_b = recordings::events(&cluster.store, b.id()).await?;
    let digests_at = |recording: &Recording| {
        let positions = recording.manifest.builtin().map(|(_, positions)| positions);
        positions.map(|positions| (positions.digest_every, positions.snapshots_at.clone()))
    };
    let value = if digests_at(&a) == digests_at(&b) {
        compare(&events_a, &events_b)
    } else {
        eprintln!("digests are left out: the two recordings have them at other places");
        compare_without_digests(&events_a, &events_b)
    };
    match format {
        Format::Json | Format::Yaml => output::value(format, &value)?,
        _ if value["equal"] == true => {
            output::line(format!("equal: {} events", output::grouped(events_a.len() as u64)))?
        }
        _ => output::line(format!(
            "{} at event {}\n   {:<12} {}\n   {:<12} {}",
            value["kind"].as_str().unwrap_or_default(),
            value["event"],
            command.a,
            value["a"]["text"].as_str().unwrap_or("(the log has ended)"),
            command.b,
            value["b"]["text"].as_str().unwrap_or("(the log has ended)"),
        ))?,
    }
    Ok(if value["equal"] == true { OK } else { DIVERGED })
}

/// The same for logs whose digests stand at other icounts, and so chain to others: the checks are
/// what says whether states are equal. The event's number is the first log's.
fn compare_without_digests(a: &[Event], b: &[Event]) -> Value {
    let is_kept = |event: &Event| !matches!(event.body, Body::Digest { .. });
    let [kept_a, kept_b] =
        [a, b].map(|log| log.iter().filter(|event| is_kept(event)).cloned().collect::<Vec<_>>());
    let mut value = compare(&kept_a, &kept_b);
    if let Some(at) = value["event"].as_u64() {
        let number = a.iter().enumerate().filter(|(_, event)| is_kept(event)).nth(at as usize);
        value["event"] = number.map_or(a.len(), |(number, _)| number).into();
    }
    value
}

/// The first event that differs, and in what way: dropped, added, swapped or changed.
pub fn compare(a: &[Event], b: &[Event]) -> Value {
    let Some(at) = (0..a.len().max(b.len())).find(|i| a.get(*i) != b.get(*i)) else {
        return json!({ "equal": true, "events": a.len() });
    };
    let (x, y) = (a.get(at), b.get(at));
    let (next_x, next_y) = (a.get(at + 1), b.get(at + 1));
    let same_rest = |from_a: usize, from_b: usize| {
        let (rest_a, rest_b) = (&a[from_a.min(a.len())..], &b[from_b.min(b.len())..]);
        // A few events behind are enough to tell a shift from a change.
        rest_a.iter().zip(rest_b).take(8).all(|(x, y)| x == y)
    };
    let body = |event: Option<&Event>| event.map(|event| event.body.clone());
    let is_swapped = x.is_some()
        && y.is_some()
        && body(x) == body(next_y)
        && body(y) == body(next_x)
        && same_rest(at + 2, at + 2);
    let kind = match (x, y) {
        (None, _) => "added",
        (_, None) => "dropped",
        _ if is_swapped => "swapped",
        _ if same_rest(at + 1, at + 1) => "changed",
        _ if next_x == y && same_rest(at + 1, at) => "dropped",
        _ if next_y == x && same_rest(at, at + 1) => "added",
        _ => "changed",
    };
    let side = |event: Option<&Event>| {
        event.map(|event| json!({
        "icount": event.icount, "role": event.role, "what": event.body.to_string(), "text": event.to_string().trim(),
    }))
    };
    json!({ "equal": false, "kind": kind, "event": at, "a": side(x), "b": side(y) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use heddle_proto::{Hash, Role};

    fn log() -> Vec<Event> {
        (0..20)
            .map(|i| Event { icount: i, role: Role::Vcpu, body: Body::Check { value: i * i, output: 0 } })
            .collect()
    }

    #[test]
    fn the_first_difference_is_named() {
        let a = log();
        assert_eq!(compare(&a, &a)["equal"], true);
        let mut b = log();
        b.remove(7);
        assert_eq!(
            (compare(&a, &b)["kind"].as_str(), compare(&a, &b)["event"].as_u64()),
            (Some("dropped"), Some(7))
        );
        assert_eq!(compare(&b, &a)["kind"], "added");
        let mut b = log();
        let (x, y) = (b[3].body.clone(), b[4].body.clone());
        (b[3].body, b[4].body) = (y, x);
        assert_eq!(
            (compare(&a, &b)["kind"].as_str(), compare(&a, &b)["event"].as_u64()),
            (Some("swapped"), Some(3))
        );
        let mut b = log();
        b[9].body = Body::End;
        assert_eq!(
            (compare(&a, &b)["kind"].as_str(), compare(&a, &b)["event"].as_u64()),
            (Some("changed"), Some(9))
        );
        assert_eq!(compare(&a, &a[..12])["kind"], "dropped");
    }

    #[test]
    fn digests_at_other_places_are_no_difference() {
        let digest = |icount| Event {
            icount,
            role: Role::Vcpu,
            body: Body::Digest { root: Hash::ZERO, history: Hash::of(&[1]) },
        };
        let (mut a, b) = (log(), log());
        a.insert(5, digest(4));
        a.insert(11, digest(9));
        assert_eq!(compare(&a, &b)["equal"], false);
        assert_eq!(compare_without_digests(&a, &b)["equal"], true);
        a[15].body = Body::End;
        let value = compare_without_digests(&a, &b);
        assert_eq!((value["kind"].as_str(), value["event"].as_u64()), (Some("changed"), Some(15)));
    }
}

//! Changed logs, their hashes made good again: named by `diff` without a replay,
//! and by `hunt` between the last good check and the first bad one.
#![allow(clippy::unwrap_used)]

use heddle_proto::{AsyncEvent, Body, CheckpointKind, ClockKind, Event, v1};
use heddle_tests::{Processes, copy};

async fn log(p: &Processes, row: &v1::RecordingRow) -> Vec<Event> {
    let id = heddle_proto::RecordingId::from_slice(&row.recording).unwrap();
    let chunks = p.client.store.read(id, 0, 0).await.unwrap();
    chunks.iter().flat_map(|chunk| chunk.events().unwrap()).collect()
}

fn middle(events: &[Event], is: impl Fn(&Event) -> bool) -> usize {
    let found: Vec<usize> = (0..events.len()).filter(|i| is(&events[*i])).collect();
    found[found.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_logs_are_named() {
    let p = Processes::start(2, 5000).await;
    p.heddle(&["record", "builtin", "--name", "good", "--snapshot-every", "20000000", "-o", "json"])
        .await
        .expect(0);
    let row = p.row("good").await.unwrap();
    let events = log(&p, &row).await;

    let flipped = middle(&events, |e| matches!(e.body, Body::Clock { clock: ClockKind::Host, .. }));
    let mut changed = events.clone();
    if let Body::Clock { value, .. } = &mut changed[flipped].body {
        *value ^= 1 << 20;
    }
    copy(&p.client.store, &row, "flipped", &changed, |event| event).await;

    let dropped = middle(&events, |e| matches!(e.body, Body::Async(AsyncEvent::Block { .. })));
    let mut changed = events.clone();
    changed.remove(dropped);
    copy(&p.client.store, &row, "dropped", &changed, |event| event - u64::from(event > dropped as u64)).await;

    // Two neighbours of one icount: a completion before the bottom half that began it, say.
    let swapped = (events.len() / 2..)
        .find(|i| {
            events[*i].icount == events[i + 1].icount
                && !events[*i].body.is_mark()
                && !events[i + 1].body.is_mark()
                && events[*i].body != events[i + 1].body
        })
        .unwrap();
    let mut changed = events.clone();
    changed.swap(swapped, swapped + 1);
    copy(&p.client.store, &row, "swapped", &changed, |event| event).await;

    for (name, at, kind) in
        [("flipped", flipped, "changed"), ("dropped", dropped, "dropped"), ("swapped", swapped, "swapped")]
    {
        let diff = p.heddle(&["diff", "good", name, "-o", "json"]).await.expect(3).json();
        assert_eq!((diff["event"].as_u64(), diff["kind"].as_str()), (Some(at as u64), Some(kind)), "{diff}");
        let hunt = p.heddle(&["hunt", name, "-o", "json"]).await.expect(3).json();
        let (from, to) = (
            hunt["interval"]["from"]["event"].as_u64().unwrap(),
            hunt["interval"]["to"]["event"].as_u64().unwrap(),
        );
        assert!(from <= at as u64 && at as u64 <= to, "{name}: event {at} is not in {from}..={to}");
        assert!(to - from < 200, "{name}: {from}..={to} is no narrow interval");
        let listed: Vec<u64> =
            hunt["events"].as_array().unwrap().iter().map(|e| e["event"].as_u64().unwrap()).collect();
        assert!(listed.contains(&(at as u64)), "{name}: the events of the interval are listed");
        assert_eq!(hunt["repeated"]["same"], true, "{name}: {}", hunt["repeated"]);
    }
    p.heddle(&["diff", "good", "good"]).await.expect(0);
    p.heddle(&["hunt", "good"]).await.expect(0);

    // The role of one checkpoint flipped: at once, by name, with both roles.
    let at = middle(&events, |e| e.body == Body::Checkpoint(CheckpointKind::ClockWarpStart));
    let mut changed = events.clone();
    changed[at].role = changed[at].role.other();
    copy(&p.client.store, &row, "role", &changed, |event| event).await;
    let replay = p.heddle(&["replay", "role", "--timeout", "60", "-o", "json"]).await.expect(3).json();
    let divergence = &replay["divergence"];
    assert_eq!(divergence["kind"], "wrong-role");
    assert_eq!(
        (divergence["expected"]["role"].as_str(), divergence["found"]["role"].as_str()),
        (Some("vcpu"), Some("iothread"))
    );
    assert_eq!(divergence["position"]["event"], at);
    assert!(divergence["expected"]["what"].as_str().unwrap().contains("ClockWarpStart"));
    assert_eq!(replay["role_mismatches"], 1);
    // There is no state behind it.
    let behind = divergence["position"]["icount"].as_u64().unwrap() + 1;
    let refused = p.heddle(&["state", "role", "--at", &behind.to_string()]).await.expect(3).err;
    assert!(refused.contains("the replay diverges"), "{refused}");
    p.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said_with_its_exit_code() {
    let p = Processes::start(1, 5000).await;
    p.heddle(&["replay", "nobody"]).await.expect(4);
    p.heddle(&["get", "recordings", "nobody"]).await.expect(4);
    p.heddle(&["events", "nobody"]).await.expect(4);
    p.heddle(&["get", "nothing"]).await.expect(2);
    // The code stays, where the error can't be written.
    let mut unheard = std::process::Command::new(heddle_tests::program());
    unheard.arg("--cluster").arg(p.cluster.dir()).args(["events", "nobody"]);
    unheard.stderr(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    assert_eq!(unheard.status().unwrap().code(), Some(4));
    p.heddle(&["record", "builtin", "--name", "x", "--kernel", "/no/such/file"]).await.expect(2);
    let nonsense = p.cluster.dir().join("nonsense");
    std::fs::write(&nonsense, b"\x7fELF but no more").unwrap();
    let said = p
        .heddle(&["record", "builtin", "--name", "x", "--kernel", nonsense.to_str().unwrap()])
        .await
        .expect(2);
    assert!(said.err.contains("ELF"), "{}", said.err);
    p.heddle(&["record", "builtin", "--name", "one", "--snapshot-every", "0", "-o", "name"]).await.expect(0);
    p.heddle(&["replay", "one", "--against", "qemu-99"]).await.expect(6);
    let events = p
        .heddle(&["events", "one", "--kind", "clock-warp-start", "--role", "iothread", "-o", "json"])
        .await
        .expect(0);
    assert!(!events.json().as_array().unwrap().is_empty());
    for kind in ["recordings", "jobs", "nodes", "replicas"] {
        for format in ["table", "wide", "json", "yaml", "name"] {
            p.heddle(&["get", kind, "-o", format]).await.expect(0);
        }
    }
    p.heddle(&["describe", "recording", "one"]).await.expect(0);
    p.heddle(&["describe", "node", "node-1", "-o", "json"]).await.expect(0);
    p.cluster.stop().await;
}

//! mesh-datapath is upgraded and killed under traffic.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use netns_tests::flow::Flow;
use netns_tests::lab::{Lab, PATIENCE};
use netns_tests::wait;
use nix::sys::signal::Signal;

use crate::common::{all_between, assert_reach, end_of, pings, stream_until};
use crate::support::{drops, flows, handshakes, only_ciphertext, peer, total, uapi, watched};

const UNIT: &str = "mesh-datapath";

/// Waits until another worker than `old` serves.
fn served_anew(lab: &Lab, node: &str, old: i32) -> i32 {
    let host = lab.host(node).unwrap();
    let new = wait::until("another worker", PATIENCE, || {
        let worker = host.child_of_unit(UNIT)?;
        // `comm` of a worker that is being upgraded is the same program's.
        Ok((worker != old).then_some(worker))
    });
    uapi(lab, node, "get=stats");
    new.unwrap()
}

/// What `systemctl reload mesh-datapath@margay0` does.
fn reload(lab: &Lab, node: &str) {
    let host = lab.host(node).unwrap();
    let old = host.child_of_unit(UNIT).unwrap();
    host.signal_unit(UNIT, Signal::SIGHUP).unwrap();
    served_anew(lab, node, old);
}

/// no_new_privs, seccomp and the capabilities, of every thread of a node's worker.
fn is_in_its_sandbox(lab: &Lab, node: &str) {
    let host = lab.host(node).unwrap();
    let worker = host.child_of_unit(UNIT).unwrap();
    wait::until("the sandbox", PATIENCE, || {
        let text = host.run(&["sh", "-c", &format!("cat /proc/{worker}/task/*/status")])?;
        let fields = |name: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            lines.map(|value| value.trim().to_owned()).collect()
        };
        assert!(fields("Pid").len() > 5, "{text}");
        // CAP_NET_BIND_SERVICE and CAP_NET_ADMIN: bits 10 and 12.
        let kept = "0000000000001400".to_owned();
        for name in ["CapPrm", "CapEff", "CapBnd"] {
            assert!(fields(name).iter().all(|value| *value == kept), "{name}: {text}");
        }
        for (name, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
            anyhow::ensure!(fields(name).iter().all(|found| found == value), "{name}: {text}");
        }
        Ok(Some(()))
    })
    .unwrap();
}

#[test]
fn upgrades_of_both_datapaths_lose_no_packet_and_no_session() {
    let (lab, capture) = watched("ab", "");
    assert_reach(&all_between(&lab, "pa", "pb"));
    let before = [("a", "b"), ("b", "a")].map(|(node, peer)| handshakes(&lab, node, &[peer]));
    assert!(before.iter().flatten().all(|(_, count)| count.is_some_and(|count| count > 0)), "{before:?}");
    let units = ["a", "b"].map(|node| lab.host(node).unwrap().unit(UNIT).unwrap());
    let floods = [("pa", "pb", false), ("pb", "pa", true), ("pa", "pb", true), ("pb", "pa", false)]
        .map(|(from, to, v6)| pings(&lab, from, to, v6, 3000));
    let done = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let streams = [("pa", "pb", false), ("pb", "pa", true)].map(|(from, to, v6)| {
            scope.spawn({
                let (lab, done) = (&lab, &done);
                move || stream_until(lab, from, to, v6, done)
            })
        });
        for _ in 0..5 {
            reload(&lab, "a");
            reload(&lab, "b");
        }
        done.store(true, Ordering::SeqCst);
        streams.map(|stream| stream.join().unwrap())
    });
    println!("streams carried {sent:?} bytes");
    assert!(sent.iter().all(|bytes| *bytes > 1 << 18), "{sent:?}");
    for flood in floods {
        assert_eq!(end_of(flood), (3000, 3000));
    }
    let after = [("a", "b"), ("b", "a")].map(|(node, peer)| handshakes(&lab, node, &[peer]));
    assert_eq!(after, before, "the session is still the first one");
    for node in ["a", "b"] {
        for reason in ["unknown_index", "replayed", "bad_auth"] {
            assert_eq!(drops(&lab, node, reason), 0, "{node}: {reason}");
        }
        is_in_its_sandbox(&lab, node);
    }
    assert_eq!(["a", "b"].map(|node| lab.host(node).unwrap().unit(UNIT).unwrap()), units, "the same process");
    assert_eq!(peer(&lab, "a", "b").heals, 0);
    capture.stop().check().unwrap();
}

/// Kills something three times while flows go on; everything is back soon, and nothing was ever in clear.
fn crashes(kill: impl Fn(&Lab)) {
    let (lab, capture) = watched("ab", "");
    let flows = flows(&lab, "a", "b");
    for round in 0..3 {
        let answered: Vec<u64> = flows.iter().map(|flow| flow.count().answered).collect();
        kill(&lab);
        wait::until("all flows to go on", PATIENCE, || {
            let now: Vec<u64> = flows.iter().map(|flow| flow.count().answered).collect();
            // More than what was still under way.
            let goes_on = now.iter().zip(&answered).all(|(now, before)| *now > before + 40);
            anyhow::ensure!(goes_on, "{round}: {answered:?}, now {now:?}");
            Ok(Some(()))
        })
        .unwrap();
    }
    let unknown = drops(&lab, "a", "unknown_index") + drops(&lab, "b", "unknown_index");
    let counts: Vec<_> = flows.into_iter().map(Flow::stop).collect();
    let all = total(&counts);
    println!(
        "{} of {} lost, longest silence {:?}; {unknown} of unknown sessions",
        all.lost(),
        all.sent,
        all.silence
    );
    // A second is what is promised, and the machine may be ten times busier.
    assert!(all.silence < Duration::from_secs(10), "{counts:?}");
    assert!(all.lost() < 3 * 4 * 200 * 10 && all.duplicates == 0, "{counts:?}");
    assert_reach(&all_between(&lab, "pa", "pb"));
    is_in_its_sandbox(&lab, "b");
    only_ciphertext(&capture.stop());
}

#[test]
fn a_killed_worker_is_back_at_once_and_pods_get_nothing_in_clear() {
    crashes(|lab| {
        let host = lab.host("b").unwrap();
        let (unit, old) = (host.unit(UNIT).unwrap(), host.child_of_unit(UNIT).unwrap());
        host.run(&["kill", "-9", &old.to_string()]).unwrap();
        served_anew(lab, "b", old);
        assert_eq!(host.unit(UNIT).unwrap(), unit, "its supervisor lives");
    });
}

#[test]
fn a_killed_supervisor_is_started_again_and_pods_get_nothing_in_clear() {
    crashes(|lab| {
        let host = lab.host("b").unwrap();
        let (_, before) = host.unit(UNIT).unwrap();
        host.kill_unit(UNIT).unwrap();
        wait::until("it to be started again", PATIENCE, || {
            let (pid, restarts) = host.unit(UNIT)?;
            Ok((pid.is_some() && restarts > before).then_some(()))
        })
        .unwrap();
        assert!(host.run(&["ip", "link", "show", "margay0"]).is_ok(), "the interface outlives it");
    });
}

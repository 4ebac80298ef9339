//! A device goes from one process to the next: upgraded without losing a packet, and back after a crash. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use world::{Host, Kind, Side, alive, answers, in_world, ours, transfer, tunnel, until};

const V4: &str = "192.0.2.2:PORT";

/// Starts a process that takes the device over, and waits until it has it and the old one is gone.
fn upgrade(side: &mut Side, flags: &str) {
    let mut command = side.host.command(ours());
    command.args(["-f", "--replace", &side.interface]).args(flags.split_whitespace()).env("RUST_LOG", "info");
    let successor = command.stdin(Stdio::null()).spawn().unwrap();
    let mut old = std::mem::replace(&mut side.process, successor);
    let mut status = None;
    until("the old process ends", || {
        status = old.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success(), "{status:?}");
    answers(&side.interface);
}

/// A run of pings; its losses are known when it ends.
fn pings(host: Host, to: &str, count: u32) -> Child {
    let mut command = host.command("ping");
    command.args(["-n", "-q", "-i", "0.002", "-W", "2", "-c", &count.to_string(), to]);
    command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap()
}

fn lost(pings: Child) -> (u32, u32) {
    let text = String::from_utf8(pings.wait_with_output().unwrap().stdout).unwrap();
    let number = |before: &str| -> u32 {
        let head = text.split(before).next().unwrap();
        head.split([' ', '\n', ',']).rfind(|word| !word.is_empty()).unwrap().parse().unwrap()
    };
    let sent = number(" packets transmitted");
    (sent, sent - number(" received"))
}

/// Loads the tunnel while `body` runs; nothing may be lost and no TCP connection break.
fn under_load_nothing_is_lost(body: impl FnOnce()) {
    nothing_is_lost(|| {
        let streams = [Host::Left, Host::Right].map(|from| {
            let to = format!("10.9.0.{}", from.other().number()).parse().unwrap();
            thread::spawn(move || transfer(from, to, 64 << 20))
        });
        body();
        streams.into_iter().for_each(|stream| stream.join().unwrap());
    });
}

fn nothing_is_lost(body: impl FnOnce()) {
    let runs = [pings(Host::Left, "10.9.0.2", 2500), pings(Host::Right, "10.9.0.1", 2500)];
    body();
    for run in runs {
        let (sent, lost) = lost(run);
        println!("{lost} of {sent} lost");
        assert_eq!((sent, lost), (2500, 0));
    }
}

#[test]
fn ten_upgrades_of_each_side_lose_no_packet_and_no_session() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        Host::Left.reaches("10.9.0.2");
        let handshake = tunnel.left.show("latest-handshakes");
        under_load_nothing_is_lost(|| {
            for _ in 0..10 {
                upgrade(&mut tunnel.left, "");
                upgrade(&mut tunnel.right, "--persist");
            }
        });
        assert_eq!(tunnel.left.show("latest-handshakes"), handshake, "the session is still the first one");
        for side in [&tunnel.left, &tunnel.right] {
            assert_eq!(side.drops("unknown_index") + side.drops("replayed") + side.drops("bad_auth"), 0);
        }
    });
}

#[test]
fn an_upgrade_beside_wireguard_go_loses_nothing_either() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::WireguardGo, V4);
        Host::Left.reaches("10.9.0.2");
        // wireguard-go itself loses packets when the machine is busy, so there is no load on top.
        nothing_is_lost(|| (0..5).for_each(|_| upgrade(&mut tunnel.left, "")));
    });
}

#[test]
fn a_supervised_device_is_upgraded_the_same_way_and_its_counters_go_on() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        Host::Left.reaches("10.9.0.2");
        under_load_nothing_is_lost(|| (0..5).for_each(|_| upgrade(&mut tunnel.left, "--supervise")));
        let sent: u64 = tunnel.left.show("transfer").parse().unwrap();
        upgrade(&mut tunnel.left, "");
        assert!(tunnel.left.show("transfer").parse::<u64>().unwrap() >= sent);
    });
}

#[test]
fn a_successor_that_dies_half_way_loses_nothing() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        Host::Left.reaches("10.9.0.2");
        under_load_nothing_is_lost(|| {
            for _ in 0..10 {
                // Asks for the device and is gone.
                drop(UnixStream::connect("/run/wireguard/wg-left.handover").unwrap());
            }
        });
        assert!(alive(tunnel.left.process.id()));
        // Says something else than that it is ready.
        let mut stream = UnixStream::connect("/run/wireguard/wg-left.handover").unwrap();
        std::io::Write::write_all(&mut stream, b"x").unwrap();
        Host::Left.reaches("10.9.0.2");
    });
}

#[test]
fn without_a_running_process_replace_simply_starts() {
    in_world(|| {
        let mut process = Host::Left.command(ours()).args(["-f", "--replace", "wg-left"]).spawn().unwrap();
        answers("wg-left");
        let again = Host::Left.try_run(ours(), "-f wg-left");
        assert!(String::from_utf8_lossy(&again.stderr).contains("another process serves"), "{again:?}");
        process.kill().unwrap();
        process.wait().unwrap();
    });
}

/// The processes of two pods of which the second replaces the first, as the DaemonSet has them.
fn pod(number: u8) -> Child {
    let file = format!("--ready-file=/run/ready-{number}");
    let flags = ["-f", "--supervise", "--persist", "--standby", "--replace", "--linger", &file, "wg-left"];
    Host::Left.command(ours()).args(flags).env("RUST_LOG", "info").stdin(Stdio::null()).spawn().unwrap()
}

fn is_ready(number: u8) -> bool {
    Host::Left.try_run(ours(), &format!("--probe --ready-file=/run/ready-{number} wg-left")).status.success()
}

#[test]
fn a_pods_successor_takes_the_device_and_the_old_one_waits_for_it_to_vanish() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        let mut old = std::mem::replace(&mut tunnel.left.process, pod(1));
        until("the unsupervised process ends", || old.try_wait().unwrap().is_some());
        assert!(!is_ready(2), "a pod that was never there");
        until("the first pod is ready", || is_ready(1));
        Host::Left.reaches("10.9.0.2");
        let handshake = tunnel.left.show("latest-handshakes");
        let mut next = None;
        under_load_nothing_is_lost(|| {
            next = Some(pod(2));
            until("the second pod is ready", || is_ready(2));
        });
        let mut next = next.unwrap();
        let first = tunnel.left.process.id();
        until("the first pod's worker ends", || worker(first).is_none());
        assert_eq!(tunnel.left.show("latest-handshakes"), handshake, "the session is still the first one");

        // The successor vanishes before the old pod is deleted.
        next.kill().unwrap();
        next.wait().unwrap();
        until("the first pod drives the device again", || worker(first).is_some());
        answers("wg-left");
        next = pod(2);
        until("the second pod's new process has it", || worker(first).is_none() && is_ready(2));
        assert!(worker(next.id()).is_some() && alive(first));

        // The old pod is deleted: neither interface nor socket goes with it.
        kill(Pid::from_raw(first as i32), Signal::SIGTERM).unwrap();
        let mut status = None;
        until("the old pod ends", || {
            status = tunnel.left.process.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success() && is_ready(2));
        Host::Left.run("wg", "show wg-left");

        // A device that is deleted is made anew, by the process that had it.
        Host::Left.run("ip", "link del wg-left");
        until("there is another", || Host::Left.try_run("wg", "show wg-left").status.success());
        tunnel.left.process = next;
    });
}

/// The worker of a supervised device.
fn worker(supervisor: u32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_worker_that_is_killed_is_back_at_once_with_its_configuration() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        upgrade(&mut tunnel.left, "--supervise");
        Host::Left.reaches("10.9.0.2");
        let supervisor = tunnel.left.process.id();
        let key = tunnel.left.show("allowed-ips");
        for _ in 0..5 {
            let old = worker(supervisor).unwrap();
            let run = pings(Host::Left, "10.9.0.2", 1000);
            kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
            let start = Instant::now();
            until("another worker serves", || worker(supervisor).is_some_and(|new| new != old));
            Host::Left.reaches("10.9.0.2");
            let back = start.elapsed();
            let (sent, lost) = lost(run);
            println!("back after {back:?}; {lost} of {sent} lost");
            // A second is what is promised; the machine may be ten times busier.
            assert!(back < Duration::from_secs(10), "{back:?}");
            assert_eq!(tunnel.left.show("allowed-ips"), key);
        }
        // Whoever waits on the socket meanwhile is served by the next worker.
        kill(Pid::from_raw(worker(supervisor).unwrap()), Signal::SIGKILL).unwrap();
        assert!(Command::new("wg").args(["show", "wg-left"]).output().unwrap().status.success());
        kill(Pid::from_raw(supervisor as i32), Signal::SIGTERM).unwrap();
        until("both end", || tunnel.left.process.try_wait().unwrap().is_some());
        assert!(!fs::exists("/run/wireguard/wg-left.sock").unwrap());
        assert!(!fs::exists("/run/wireguard/wg-left.handover").unwrap());
    });
}

#[test]
fn a_hangup_upgrades_a_supervised_device_in_place_and_loses_nothing() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, V4);
        upgrade(&mut tunnel.left, "--supervise");
        Host::Left.reaches("10.9.0.2");
        let supervisor = tunnel.left.process.id();
        under_load_nothing_is_lost(|| {
            for _ in 0..5 {
                let old = worker(supervisor).unwrap();
                kill(Pid::from_raw(supervisor as i32), Signal::SIGHUP).unwrap();
                until("another worker serves", || !alive(old as u32) && worker(supervisor).is_some());
                answers("wg-left");
            }
        });
        assert!(alive(supervisor));
        kill(Pid::from_raw(supervisor as i32), Signal::SIGTERM).unwrap();
        until("both end", || tunnel.left.process.try_wait().unwrap().is_some());
    });
}

#[test]
fn a_killed_supervisor_takes_its_worker_with_it_and_leaves_the_interface() {
    in_world(|| {
        let mut process = Host::Left.command(ours()).args(["-f", "--supervise", "wg-left"]).spawn().unwrap();
        answers("wg-left");
        let worker = worker(process.id()).unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
        until("the worker ends", || !alive(worker as u32));
        assert!(Host::Left.try_run("ip", "link show wg-left").status.success());
        let mut next = Host::Left.command(ours()).args(["-f", "--supervise", "wg-left"]).spawn().unwrap();
        answers("wg-left");
        next.kill().unwrap();
        next.wait().unwrap();
    });
}

#[test]
fn the_worker_runs_in_its_sandbox_and_its_memory_is_nobodys() {
    in_world(|| {
        let mut process = Host::Left.command(ours()).args(["-f", "--supervise", "wg-left"]).spawn().unwrap();
        answers("wg-left");
        let worker = worker(process.id()).unwrap();
        let threads: Vec<_> = fs::read_dir(format!("/proc/{worker}/task")).unwrap().collect();
        assert!(threads.len() > 5);
        for thread in threads {
            let path = thread.unwrap().path().join("status");
            // It goes into the sandbox as the last thing.
            until("the sandbox", || fs::read_to_string(&path).unwrap().contains("Seccomp:\t2"));
            let status = fs::read_to_string(&path).unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().to_owned()
            };
            assert_eq!(
                (field("Seccomp:"), field("NoNewPrivs:")),
                ("2".to_owned(), "1".to_owned()),
                "{status}"
            );
            // CAP_NET_BIND_SERVICE and CAP_NET_ADMIN.
            assert_eq!(u64::from_str_radix(&field("CapEff:"), 16).unwrap(), 1 << 10 | 1 << 12);
        }
        process.kill().unwrap();
        process.wait().unwrap();
    });
}

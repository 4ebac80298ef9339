//! How the process comes, goes, dies and comes back. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use world::{Host, Kind, Side, alive, answers, in_world, ours, tunnel, until};

const SOCKET: &str = "/var/run/wireguard/wg-left.sock";

/// Ends with the world, where the test does not end it.
#[allow(clippy::zombie_processes)]
fn start(flags: &str) -> Child {
    let mut command = Host::Left.command(ours());
    let child = command.args(flags.split_whitespace()).args(["-f", "wg-left"]).spawn().unwrap();
    answers("wg-left");
    child
}

/// Must fail; returns what it says.
fn refused(host: Host, interface: &str) -> String {
    let output = host.try_run(ours(), &format!("-f {interface}"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn exists(interface: &str) -> bool {
    Host::Left.try_run("ip", &format!("link show {interface}")).status.success()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Waits for the end; true for exit code 0.
fn ends_well(mut child: Child) -> bool {
    let mut status = None;
    until("the process ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().success()
}

/// The process that serves `wg-left` in the background.
fn daemon() -> u32 {
    let served_by = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().contains("mesh-datapath")
    };
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    pids.filter(served_by).find(|pid| alive(*pid)).unwrap()
}

#[test]
fn without_f_it_returns_once_the_socket_answers() {
    in_world(|| {
        assert!(Host::Left.command(ours()).arg("wg-left").status().unwrap().success());
        assert!(UnixStream::connect(SOCKET).is_ok(), "it returned before the socket answers");
        Host::Left.run("wg", "show wg-left");
        let pid = daemon();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let session: u32 =
            stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap();
        assert_eq!(session, pid, "it is no session of its own");
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(), Path::new("/dev/null"));
        kill(Pid::from_raw(pid as i32), Signal::SIGTERM).unwrap();
        // Its first thread is gone a moment before its last one lets go of the TUN.
        until("it ends", || !alive(pid) && !exists("wg-left") && !Path::new(SOCKET).exists());
    });
}

#[test]
fn a_signal_takes_the_interface_and_the_socket_along() {
    in_world(|| {
        for term in [Signal::SIGTERM, Signal::SIGINT] {
            let child = start("");
            signal(&child, term);
            assert!(ends_well(child));
            assert!(!exists("wg-left") && !Path::new(SOCKET).exists());
        }
    });
}

#[test]
fn with_persist_the_interface_stays_and_is_taken_over_with_its_routes() {
    in_world(|| {
        let child = start("--persist");
        Host::Left.run("ip", "addr add 10.9.0.1/24 dev wg-left");
        Host::Left.run("ip", "link set wg-left up mtu 1300");
        let before = Host::Left.run("ip", "-j route show dev wg-left");
        signal(&child, Signal::SIGTERM);
        assert!(ends_well(child));
        assert!(exists("wg-left") && !Path::new(SOCKET).exists());
        assert!(!Host::Left.pings("10.9.0.2"), "fails closed");
        let child = start("--persist");
        assert_eq!(
            Host::Left
                .run("ip", "-j route show dev wg-left")
                .replace(r#","flags":["linkdown"]"#, r#","flags":[]"#),
            before
        );
        assert!(Host::Left.run("ip", "link show wg-left").contains("mtu 1300"));
        signal(&child, Signal::SIGTERM);
        assert!(ends_well(child));
    });
}

#[test]
fn kill_9_leaves_the_interface_and_a_new_process_takes_it_and_the_stale_socket_over() {
    in_world(|| {
        let mut tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        let index = || Host::Left.run("ip", "-o link show wg-left").split(':').next().unwrap().to_owned();
        let before = index();
        let config = Host::Left.run("wg", "showconf wg-left");
        tunnel.left.process.kill().unwrap();
        tunnel.left.process.wait().unwrap();
        assert!(Path::new(SOCKET).exists(), "the socket's file is stale");
        let route = Host::Left.run("ip", "route get 10.9.0.2");
        assert!(route.contains("dev wg-left"), "packets take another road: {route}");
        assert!(!Host::Left.pings("10.9.0.2"), "fails closed");
        tunnel.left.process = Side::spawn(Host::Left, Kind::Ours, "wg-left");
        answers("wg-left");
        assert_eq!(index(), before);
        fs::write("/run/left.conf", config).unwrap();
        Host::Left.run("wg", "setconf wg-left /run/left.conf");
        Host::Left.reaches("10.9.0.2");
        Host::Right.reaches("10.9.0.1");
    });
}

#[test]
fn it_ends_when_the_interface_is_deleted() {
    in_world(|| {
        for flags in ["", "--persist"] {
            let child = start(flags);
            Host::Left.run("ip", "link del wg-left");
            assert!(ends_well(child));
            assert!(!Path::new(SOCKET).exists());
        }
    });
}

#[test]
fn it_ends_when_the_socket_is_removed_or_replaced() {
    in_world(|| {
        let child = start("");
        fs::remove_file(SOCKET).unwrap();
        assert!(ends_well(child));
        assert!(!exists("wg-left"));
        let child = start("");
        fs::remove_file(SOCKET).unwrap();
        let _other = UnixListener::bind(SOCKET).unwrap();
        assert!(ends_well(child));
        assert!(Path::new(SOCKET).exists(), "it took another's socket away");
    });
}

#[test]
fn an_interface_or_socket_in_use_is_refused_by_name_and_left_alone() {
    in_world(|| {
        let child = start("");
        let said = refused(Host::Left, "wg-left");
        assert!(said.contains("wg-left.sock: another process serves this interface"), "{said}");
        assert!(!Host::Right.try_run("ip", "link show wg-left").status.success());
        let said = refused(Host::Right, "wg-left");
        assert!(said.contains("another process serves"), "{said}");
        fs::rename(SOCKET, "/run/hidden.sock").unwrap();
        let said = refused(Host::Left, "wg-left");
        assert!(said.contains("interface wg-left is in use by another process"), "{said}");
        assert!(ends_well(child));

        let said = refused(Host::Left, "wire");
        assert!(said.contains("interface wire exists and is no TUN device"), "{said}");
        assert!(exists("wire"));
        fs::write(SOCKET, "not a socket").unwrap();
        let said = refused(Host::Left, "wg-left");
        assert!(said.contains("wg-left.sock: exists and is no socket"), "{said}");
        assert_eq!(fs::read(SOCKET).unwrap(), b"not a socket");
        assert!(!exists("wg-left"), "an interface is left behind");
        for name in ["tun%d", "../wg0", "sixteen-bytes-xx"] {
            assert!(refused(Host::Left, name).contains("is no interface name"), "{name}");
        }
        assert!(!Host::Left.run("ip", "-o link").contains("tun"));
    });
}

#[test]
fn the_socket_is_for_its_owner_only() {
    in_world(|| {
        let child = start("");
        let file = fs::symlink_metadata(SOCKET).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        let directory = fs::metadata("/var/run/wireguard").unwrap();
        assert_eq!(directory.permissions().mode() & 0o777, 0o700);
        signal(&child, Signal::SIGTERM);
        assert!(ends_well(child));
    });
}

#[test]
fn after_set_up_every_thread_keeps_two_capabilities_and_cannot_gain_any() {
    in_world(|| {
        let child = start("");
        let tasks: Vec<_> = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().collect();
        assert!(tasks.len() >= 5, "{} threads", tasks.len());
        for task in tasks {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|l| l.starts_with(name)).unwrap();
                u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
            };
            // CAP_NET_ADMIN is 12, CAP_NET_BIND_SERVICE is 10.
            let kept = 1 << 12 | 1 << 10;
            assert_eq!((field("CapEff"), field("CapPrm"), field("CapBnd")), (kept, kept, kept));
            assert_eq!((field("CapInh"), field("CapAmb"), field("NoNewPrivs")), (0, 0, 1));
        }
        // What they are kept for still works.
        Host::Left.run("wg", "set wg-left listen-port 53 fwmark 0x2000");
        assert_eq!(Host::Left.run("wg", "show wg-left fwmark").trim(), "0x2000");
        signal(&child, Signal::SIGTERM);
        assert!(ends_well(child));
    });
}

#[test]
fn systemd_is_told_when_the_socket_answers() {
    in_world(|| {
        let listener = UnixDatagram::bind("/run/notify.sock").unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut command = Host::Left.command(ours());
        command.args(["-f", "wg-left"]).env("NOTIFY_SOCKET", "/run/notify.sock").stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut buffer = [0; 64];
        let n = listener.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"READY=1");
        Host::Left.run("wg", "show wg-left");
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn on_standby_it_waits_for_another_link_to_go_and_ends_when_told() {
    in_world(|| {
        Host::Left.run("ip", "link add wg-left type veth peer name other");
        let listener = UnixDatagram::bind("/run/notify.sock").unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let standby = |flags: &str| {
            let mut command = Host::Left.command(ours());
            command.args(flags.split_whitespace()).args(["-f", "--standby", "wg-left"]);
            command.env("NOTIFY_SOCKET", "/run/notify.sock").stdin(Stdio::null());
            #[allow(clippy::zombie_processes)] // Each ends below.
            let child = command.spawn().unwrap();
            // Told that it is ready, though there is nothing to do yet: its unit has started.
            let mut buffer = [0; 64];
            let n = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], b"READY=1");
            assert!(!Path::new(SOCKET).exists());
            child
        };
        let child = standby("");
        signal(&child, Signal::SIGTERM);
        assert!(ends_well(child));
        for flags in ["", "--supervise"] {
            let child = standby(flags);
            // What other links do is none of its business.
            Host::Left.run("ip", "link add other0 type veth peer name other1");
            Host::Left.run("ip", "link del other0");
            assert!(!Path::new(SOCKET).exists());
            Host::Left.run("ip", "link del wg-left");
            answers("wg-left");
            assert!(Host::Left.run("ip", "-d link show wg-left").contains("tun type tun"));
            signal(&child, Signal::SIGTERM);
            assert!(ends_well(child));
            let mut buffer = [0; 64];
            let n = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], b"READY=1", "once more, when it serves");
            Host::Left.run("ip", "link add wg-left type veth peer name other");
        }
    });
}

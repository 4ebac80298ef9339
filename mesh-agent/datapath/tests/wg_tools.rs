//! Stock wg(8) and wg-quick(8) on our device. Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mesh_uapi::{Client, Op, PeerUpdate};
use world::{Host, Kind, Side, in_world, new_key, ours, tunnel, until};

fn wg(arguments: &str) -> String {
    Host::Left.run("wg", arguments)
}

/// Sends raw text to the UAPI socket; returns the reply.
fn raw(text: &str) -> String {
    let mut stream = UnixStream::connect("/var/run/wireguard/wg-left.sock").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

#[test]
fn wg_set_and_show_agree_on_every_field() {
    in_world(|| {
        let side = Side::start(Host::Left, Kind::Ours);
        let (_, peer) = new_key("peer");
        let (psk, _) = new_key("psk");
        let (_, other) = new_key("other");
        side.wg(&format!(
            "fwmark 0xca6c peer {peer} preshared-key {psk} endpoint [2001:db8::2]:1234 persistent-keepalive 25 \
             allowed-ips 10.1.2.3/16,fd00::/8 peer {other} endpoint 192.0.2.2:99 allowed-ips 0.0.0.0/0"
        ));
        let key = fs::read_to_string("/run/left.key").unwrap();
        assert_eq!(wg("show wg-left private-key"), key);
        assert_eq!(wg("show wg-left public-key").trim(), side.public_key);
        assert_eq!(wg("show wg-left listen-port").trim(), "51821");
        assert_eq!(wg("show wg-left fwmark").trim(), "0xca6c");
        let lines = |what: &str| {
            let mut lines: Vec<_> = wg(&format!("show wg-left {what}")).lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let both = |a: &str, b: &str| {
            let mut lines = vec![format!("{peer}\t{a}"), format!("{other}\t{b}")];
            lines.sort();
            lines
        };
        let preshared = fs::read_to_string(&psk).unwrap();
        assert_eq!(lines("preshared-keys"), both(preshared.trim(), "(none)"));
        assert_eq!(lines("endpoints"), both("[2001:db8::2]:1234", "192.0.2.2:99"));
        assert_eq!(lines("persistent-keepalive"), both("25", "off"));
        assert_eq!(lines("allowed-ips"), both("10.1.0.0/16 fd00::/8", "0.0.0.0/0"));
        assert_eq!(lines("latest-handshakes"), both("0", "0"));

        side.wg(&format!(
            "peer {peer} persistent-keepalive off preshared-key /dev/null allowed-ips fd00::/8"
        ));
        assert_eq!(lines("persistent-keepalive"), both("off", "off"));
        assert_eq!(lines("preshared-keys"), both("(none)", "(none)"));
        assert_eq!(lines("allowed-ips"), both("fd00::/8", "0.0.0.0/0"));
        side.wg(&format!("fwmark 0 peer {other} remove"));
        assert_eq!(lines("allowed-ips"), [format!("{peer}\tfd00::/8")]);
        assert_eq!(wg("show wg-left fwmark").trim(), "off");
        assert_eq!(wg("show interfaces").trim(), "wg-left");
    });
}

#[test]
fn showconf_setconf_addconf_and_syncconf_go_round() {
    in_world(|| {
        let side = Side::start(Host::Left, Kind::Ours);
        let (_, one) = new_key("one");
        let (_, two) = new_key("two");
        side.wg(&format!("peer {one} allowed-ips 10.1.0.0/16 endpoint 192.0.2.2:1"));
        let saved = wg("showconf wg-left");
        fs::write("/run/saved.conf", &saved).unwrap();

        fs::write("/run/more.conf", format!("[Peer]\nPublicKey = {two}\nAllowedIPs = 10.2.0.0/16\n"))
            .unwrap();
        wg("addconf wg-left /run/more.conf");
        assert_eq!(wg("show wg-left peers").lines().count(), 2);
        wg("syncconf wg-left /run/saved.conf");
        assert_eq!(wg("showconf wg-left"), saved);
        side.wg(&format!("peer {one} remove peer {two} allowed-ips 10.1.0.0/16"));
        wg("setconf wg-left /run/saved.conf");
        assert_eq!(wg("showconf wg-left"), saved);
        // Without a key in it, setconf takes the key away.
        fs::write("/run/empty.conf", "[Interface]\n").unwrap();
        wg("setconf wg-left /run/empty.conf");
        assert_eq!(wg("show wg-left private-key").trim(), "(none)");
        assert_eq!(wg("show wg-left peers"), "");
    });
}

#[test]
fn syncconf_of_what_is_there_leaves_the_session_alone() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        let before = tunnel.left.show("latest-handshakes");
        fs::write("/run/same.conf", wg("showconf wg-left")).unwrap();
        wg("syncconf wg-left /run/same.conf");
        assert!(Host::Left.pings("10.9.0.2"));
        assert_eq!(tunnel.left.show("latest-handshakes"), before);
    });
}

#[test]
fn the_port_can_change_under_a_tunnel_and_a_taken_one_is_refused() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::Ours, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        tunnel.left.wg("listen-port 6000");
        assert_eq!(wg("show wg-left listen-port").trim(), "6000");
        Host::Left.reaches("10.9.0.2");
        assert_eq!(tunnel.right.show("endpoints"), "192.0.2.1:6000", "the other side follows");
        tunnel.left.wg("listen-port 0");
        let random: u16 = wg("show wg-left listen-port").trim().parse().unwrap();
        assert!(random != 6000 && random != 0);
        Host::Left.reaches("10.9.0.2");

        let (taken, port) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let holder = Host::Left.on_thread(move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            taken.send(socket.local_addr().unwrap().port()).unwrap();
            let _ = wait.recv();
        });
        let output = Host::Left.try_run("wg", &format!("set wg-left listen-port {}", port.recv().unwrap()));
        assert!(String::from_utf8_lossy(&output.stderr).contains("Address already in use"), "{output:?}");
        assert_eq!(wg("show wg-left listen-port").trim(), random.to_string());
        Host::Left.reaches("10.9.0.2");
        drop(done);
        holder.join().unwrap();
    });
}

#[test]
fn a_new_private_key_makes_new_sessions() {
    in_world(|| {
        let tunnel = tunnel(Kind::Ours, Kind::WireguardGo, "192.0.2.2:PORT");
        Host::Left.reaches("10.9.0.2");
        let (file, public) = new_key("new");
        tunnel.left.wg(&format!("private-key {file}"));
        assert!(!Host::Left.pings("10.9.0.2"), "the old session went on");
        tunnel
            .right
            .wg(&format!("peer {} remove peer {public} allowed-ips 10.9.0.1/32", tunnel.left.public_key));
        Host::Left.reaches("10.9.0.2");
    });
}

#[test]
fn bad_requests_get_an_errno_and_change_nothing() {
    in_world(|| {
        let _side = Side::start(Host::Left, Kind::Ours);
        let before = wg("showconf wg-left");
        let key = "a".repeat(64);
        for bad in [
            "nonsense\n\n".to_owned(),
            "set=1\nlisten_port=99999\n\n".to_owned(),
            "set=1\nlisten_port=7\nfwmark=x\n\n".to_owned(),
            format!("set=1\npublic_key={key}\nallowed_ip=10.0.0.0/33\n\n"),
            format!("set=1\npublic_key={:064}\n\n", 0),
            format!("set=1\nlisten_port=7\nprivate_key={key}\nx={}\n\n", "y".repeat(5000)),
        ] {
            assert_eq!(raw(&bad), "errno=-22\n\n", "{bad:.60}");
            assert_eq!(wg("showconf wg-left"), before, "{bad:.60}");
        }
        raw("set=1\nlisten_port=7\n");
        assert_eq!(wg("showconf wg-left"), before, "a request without its end was applied");
        assert!(raw("get=1\n\nget=1\n\n").matches("errno=0").count() == 2, "one connection, two requests");
    });
}

#[test]
fn a_client_that_stalls_keeps_nobody_else_waiting() {
    in_world(|| {
        let _side = Side::start(Host::Left, Kind::Ours);
        let mut stalled = UnixStream::connect("/var/run/wireguard/wg-left.sock").unwrap();
        stalled.write_all(b"set=1\nlisten_port=").unwrap();
        let start = std::time::Instant::now();
        wg("show wg-left");
        assert!(start.elapsed() < Duration::from_secs(3));
    });
}

#[test]
fn our_client_reads_applies_and_counts() {
    in_world(|| {
        let side = Side::start(Host::Left, Kind::Ours);
        let client = Client::new("/var/run/wireguard/wg-left.sock");
        let (_, peer) = new_key("peer");
        let peer = peer.parse().unwrap();
        let update = PeerUpdate {
            endpoint: Some("192.0.2.2:9".parse().unwrap()),
            add_allowed_ips: ["10.9.0.9/32".parse().unwrap()].into(),
            ..Default::default()
        };
        client.apply(&[Op::SetPeer(peer, update), Op::SetListenPort(7000)]).unwrap();
        let device = client.get().unwrap();
        assert_eq!(device.public_key.unwrap().to_string(), side.public_key);
        assert_eq!((device.listen_port, device.peers.len()), (7000, 1));
        assert_eq!(device.peers[&peer].endpoint, Some("192.0.2.2:9".parse().unwrap()));
        let before = client.stats().unwrap().drops["no_peer"];
        assert!(!Host::Left.pings("10.9.0.77"));
        assert!(client.stats().unwrap().drops["no_peer"] > before);
        Host::Left.run("ip", "link set wg-left mtu 1380");
        until("the new MTU is seen", || client.stats().unwrap().mtu == 1380);
    });
}

#[test]
fn wg_quick_brings_it_up_and_down() {
    in_world(|| {
        let right = Side::start(Host::Right, Kind::WireguardGo);
        let (_, public) = new_key("quick");
        right.wg(&format!("peer {public} allowed-ips 10.9.0.1/32"));
        let private = fs::read_to_string("/run/quick.key").unwrap();
        let config = format!(
            "[Interface]\nPrivateKey = {private}Address = 10.9.0.1/24\nMTU = 1400\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.0/24\nEndpoint = 192.0.2.2:{}\n",
            right.public_key, right.port
        );
        fs::write("/run/wgq0.conf", config).unwrap();
        let quick = |action: &str| {
            let mut command = Host::Left.command("wg-quick");
            world::must(
                command.args([action, "/run/wgq0.conf"]).env("WG_QUICK_USERSPACE_IMPLEMENTATION", ours()),
            )
        };
        quick("up");
        Host::Left.reaches("10.9.0.2");
        assert!(Host::Left.run("ip", "link show wgq0").contains("mtu 1400"));
        quick("down");
        until("the socket is gone", || !Path::new("/var/run/wireguard/wgq0.sock").exists());
        assert!(!Host::Left.try_run("ip", "link show wgq0").status.success());
    });
}

//! A world for one test: two hosts as network namespaces with a wire between them.
//!
//! ```text
//!   left  192.0.2.1, 2001:db8::1  ── veth ──  192.0.2.2, 2001:db8::2  right
//!         tunnel 10.9.0.1, fd09::1            tunnel 10.9.0.2, fd09::2
//! ```
//!
//! The test runs itself again inside fresh network, mount and PID namespaces with a /run of its own. So names
//! need not be unique, and whatever ends the test, the kernel takes everything away with it.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, unused_imports)]

mod relay;
mod wireguard;

use std::fs::File;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io::Read as _, io::Write as _};

use nix::sched::{CloneFlags, setns};

pub use relay::Relay;
pub use wireguard::{Kind, Side, Tunnel, answers, new_key, ours, tunnel};

const INSIDE: &str = "MARGAY_TEST_WORLD";
/// For anything that should happen.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    Left,
    Right,
}

/// Runs `body` in a world. To be the only statement of a test: it starts the test's process anew.
pub fn in_world(body: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        set_up();
        return body();
    }
    let test = thread::current().name().unwrap().to_owned();
    let mut again = Command::new("setpriv");
    again.args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork"]);
    again.args(["--kill-child=KILL", "--mount-proc"]).arg(env::current_exe().unwrap());
    let output = again.args([&test, "--exact", "--nocapture"]).env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && text.contains("1 passed");
    assert!(passed, "{test} in its world:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn set_up() {
    run("mount", "-t tmpfs -o mode=755 none /run");
    for (host, side) in [("left", 1), ("right", 2)] {
        run("ip", &format!("netns add {host}"));
        run("ip", &format!("-n {host} link set lo up"));
        if side == 2 {
            run("ip", "link add wire netns left type veth peer name wire netns right");
        }
    }
    for (host, side) in [("left", 1), ("right", 2)] {
        run("ip", &format!("-n {host} addr add 192.0.2.{side}/24 dev wire"));
        run("ip", &format!("-n {host} addr add 2001:db8::{side}/64 dev wire nodad"));
        run("ip", &format!("-n {host} link set wire up"));
    }
}

impl Host {
    pub fn name(self) -> &'static str {
        match self {
            Host::Left => "left",
            Host::Right => "right",
        }
    }

    pub fn other(self) -> Host {
        match self {
            Host::Left => Host::Right,
            Host::Right => Host::Left,
        }
    }

    pub fn number(self) -> u8 {
        match self {
            Host::Left => 1,
            Host::Right => 2,
        }
    }

    /// A command in this host's network.
    pub fn command(self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name())).arg(program);
        command
    }

    /// Runs a command line that must succeed.
    pub fn run(self, program: &str, arguments: &str) -> String {
        must(self.command(program).args(arguments.split_whitespace()))
    }

    /// Runs a command line that may fail.
    pub fn try_run(self, program: &str, arguments: &str) -> Output {
        self.command(program).args(arguments.split_whitespace()).output().unwrap()
    }

    /// Runs `body` on a thread in this host's network.
    pub fn on_thread<T: Send + 'static>(
        self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        thread::spawn(move || {
            setns(File::open(format!("/run/netns/{}", self.name())).unwrap(), CloneFlags::CLONE_NEWNET)
                .unwrap();
            body()
        })
    }

    /// Pings until it answers.
    pub fn reaches(self, address: &str) {
        until(&format!("{} reaches {address}", self.name()), || self.pings(address));
    }

    pub fn pings(self, address: &str) -> bool {
        self.try_run("ping", &format!("-n -c 1 -W 1 {address}")).status.success()
    }
}

/// Runs a command line in the world's own namespaces.
pub fn run(program: &str, arguments: &str) -> String {
    must(Command::new(program).args(arguments.split_whitespace()))
}

pub fn must(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{error}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until `condition`, and fails with `what` if it does not come about.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process is there and no zombie: nobody waits for the daemons of this world.
pub fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// Bytes that no two places have in common.
fn pattern(offset: usize, out: &mut [u8]) {
    for (n, byte) in out.iter_mut().enumerate() {
        let at = (offset + n) as u64;
        *byte = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

/// Sends `size` bytes by TCP from one host to an address of the other, which checks each of them.
pub fn transfer(from: Host, to: IpAddr, size: usize) {
    let (ready, port) = std::sync::mpsc::channel();
    let receiver = from.other().on_thread(move || {
        let listener = TcpListener::bind(SocketAddr::new(to, 0)).unwrap();
        ready.send(listener.local_addr().unwrap().port()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut buffer, mut expected, mut received) = ([0; 65536], [0; 65536], 0);
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                return received;
            }
            pattern(received, &mut expected[..n]);
            assert!(buffer[..n] == expected[..n], "bytes differ near {received}");
            received += n;
        }
    });
    let port = port.recv_timeout(DEADLINE).unwrap();
    let sender = from.on_thread(move || {
        let address = SocketAddr::new(to, port);
        let mut stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let (mut sent, mut buffer) = (0, [0; 65536]);
        while sent < size {
            let n = buffer.len().min(size - sent);
            pattern(sent, &mut buffer[..n]);
            stream.write_all(&buffer[..n]).unwrap();
            sent += n;
        }
    });
    sender.join().unwrap();
    assert_eq!(receiver.join().unwrap(), size);
}

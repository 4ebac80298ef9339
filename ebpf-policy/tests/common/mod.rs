//! A host with pods, for tests: a thread with network and mount namespaces of its own and a bpffs that only it sees. When the
//! thread ends, however it ends, the kernel takes all of it away.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    dead_code,
    unreachable_pub,
    reason = "tests; each binary uses a part"
)]

pub mod cluster;
pub mod packet;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ebpf_policy::model::{LocalEndpoint, PodRef};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// How long an expected "denied" is waited for: a denial is silence.
pub const SILENCE: Duration = Duration::from_millis(400);
/// How long anything expected may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `test` on a host of its own. A panic in it fails the test.
pub fn on_a_host(test: impl FnOnce(&Host) + Send + 'static) {
    let run = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("tests of the kernel need root");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
        let host = Host { bpffs: dir.path().to_owned() };
        ip("link set lo up");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&host)));
        nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        dir.close().unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    if let Err(panic) = run.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The host that the test's thread is on.
pub struct Host {
    bpffs: PathBuf,
}

impl Host {
    /// Where pins may go.
    pub fn pin_dir(&self) -> PathBuf {
        self.bpffs.join("margay")
    }

    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// A pod with a veth to the host, as the CNI plugin makes it.
    pub fn pod(&self, name: &str, ips: &[&str]) -> Pod {
        let worker = Worker::start();
        let ifname = format!("mgy{name}");
        ip(&format!("link add {ifname} type veth peer name eth0 netns {}", worker.tid));
        ip(&format!("link set {ifname} address ee:ee:ee:ee:ee:ee up"));
        let ips: Vec<IpAddr> = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let (inside, mac) = (
            ips.clone(),
            worker.run(|| {
                ip("link set lo up");
                ip("link set eth0 up");
                std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                let link = Command::new("ip").args(["-br", "link", "show", "eth0"]).output().unwrap();
                String::from_utf8(link.stdout).unwrap().split_whitespace().nth(2).unwrap().to_owned()
            }),
        );
        worker.run(move || {
            for address in &inside {
                let (length, gateway, extra) = match address {
                    IpAddr::V4(_) => (32, "169.254.1.1", ""),
                    IpAddr::V6(_) => (128, "fe80::1", " nodad"),
                };
                ip(&format!("addr add {address}/{length} dev eth0{extra}"));
                ip(&format!("neigh replace {gateway} lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent"));
                ip(&format!("route replace {gateway} dev eth0"));
                ip(&format!("route replace default via {gateway} dev eth0"));
            }
        });
        for address in &ips {
            let length = if address.is_ipv4() { 32 } else { 128 };
            ip(&format!("neigh replace {address} lladdr {mac} dev {ifname} nud permanent"));
            ip(&format!("route replace {address}/{length} dev {ifname}"));
        }
        let ifindex = nix::net::if_::if_nametoindex(ifname.as_str()).unwrap();
        Pod { name: name.to_owned(), ifname, ifindex, ips, worker }
    }
}

/// Runs `ip` with these words in the calling thread's namespace.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A pod: a thread in a network namespace of its own.
pub struct Pod {
    pub name: String,
    pub ifname: String,
    pub ifindex: u32,
    pub ips: Vec<IpAddr>,
    worker: Worker,
}

impl Pod {
    pub fn endpoint(&self, namespace: &str) -> LocalEndpoint {
        LocalEndpoint {
            ifindex: self.ifindex,
            ifname: self.ifname.clone(),
            pod: Some(PodRef { namespace: namespace.into(), name: self.name.clone() }),
            ips: self.ips.clone(),
        }
    }

    /// Runs a closure in the pod.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.worker.run(job)
    }

    /// Answers every TCP connection on a port with an echo, until the test ends.
    pub fn serve_tcp(&self, port: u16) {
        let address = SocketAddr::new(self.ips[0], port);
        let listener = self.run(move || TcpListener::bind(address).unwrap());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || echo(stream));
            }
        });
    }

    /// Answers every UDP datagram on a port, until the test ends.
    pub fn serve_udp(&self, port: u16) {
        let address = SocketAddr::new(self.ips[0], port);
        let socket = self.run(move || UdpSocket::bind(address).unwrap());
        thread::spawn(move || {
            let mut buffer = [0; 65_535];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    }

    /// A TCP connection to another pod, if it comes about within the time.
    pub fn connect(&self, to: &Pod, port: u16, patience: Duration) -> Option<TcpStream> {
        let address = SocketAddr::new(to.ips[0], port);
        self.run(move || match TcpStream::connect_timeout(&address, patience) {
            Ok(stream) => Some(stream),
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock) =>
            {
                None
            }
            Err(error) => panic!("denied traffic must be dropped in silence, but: {error}"),
        })
    }

    pub fn reaches(&self, to: &Pod, port: u16) -> bool {
        self.connect(to, port, PATIENCE).is_some_and(|mut stream| ping_stream(&mut stream, PATIENCE))
    }

    pub fn is_cut_off(&self, to: &Pod, port: u16) -> bool {
        self.connect(to, port, SILENCE).is_none()
    }

    /// Whether a UDP datagram of this size is answered within the time.
    pub fn udp(&self, to: &Pod, port: u16, size: usize, patience: Duration) -> bool {
        let (from, address) = (SocketAddr::new(self.ips[0], 0), SocketAddr::new(to.ips[0], port));
        self.run(move || {
            let socket = UdpSocket::bind(from).unwrap();
            socket.set_read_timeout(Some(patience)).unwrap();
            socket.send_to(&vec![7; size], address).unwrap();
            let mut buffer = vec![0; 65_535];
            socket.recv(&mut buffer).is_ok_and(|length| length == size)
        })
    }
}

/// Whether an echo server answers on an open connection within the time.
pub fn ping_stream(stream: &mut TcpStream, patience: Duration) -> bool {
    let mut answer = [0; 4];
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok() && &answer == b"ping"
}

pub fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Waits until a condition holds; panics with `what` if it never does.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that runs closures in a network namespace of its own.
struct Worker {
    tid: i32,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    fn start() -> Self {
        let (jobs, todo) = channel::<Job>();
        let (ready, tid) = channel();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            while let Ok(job) = todo.recv() {
                job();
            }
        });
        Self { tid: tid.recv().unwrap(), jobs: Some(jobs), thread: Some(thread) }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job = Box::new(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            let _ = done.send(outcome);
        });
        self.jobs.as_ref().unwrap().send(job).unwrap();
        match result.recv().unwrap() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let _ = self.thread.take().unwrap().join();
    }
}

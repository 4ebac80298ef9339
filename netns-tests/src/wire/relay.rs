//! The relay: a switch in user space between packet sockets, which delays, loses, re-orders, cuts and
//! refuses frames as [`super::impair`] says. It knows who is on which port by the lab's MAC addresses.
#![allow(unsafe_code)] // ethtool's ioctl has no wrapper.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Protocol, Socket, Type};

use super::frame::{self, TooBig};
use super::impair::{Counts, Links, Verdict};
use crate::netns::Netns;

#[derive(Debug)]
struct Port {
    host: String,
    mac: [u8; 6],
    socket: Arc<Socket>,
}

#[derive(Debug)]
struct Shared {
    ports: Mutex<BTreeMap<usize, Port>>,
    counts: Mutex<BTreeMap<(String, String), Counts>>,
    links: Arc<Mutex<Links>>,
    wake: EventFd,
    stop: AtomicBool,
}

/// The relay's thread; ends when dropped.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts with no port.
    pub fn start(links: Arc<Mutex<Links>>) -> Result<Self> {
        let shared = Arc::new(Shared {
            ports: Mutex::default(),
            counts: Mutex::default(),
            links,
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("eventfd")?,
            stop: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || Worker::new(of_thread).run())
            .context("start the relay")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes a port (an interface `portN` of the wire's namespace) in, or anew after its host was rebooted.
    pub fn plug(&self, wire: &Netns, index: usize, host: &str) -> Result<()> {
        let socket = wire.run(|| packet_socket(&format!("port{index}")))??;
        let mac = [2, 0x4d, 0x67, 0, (index >> 8 & 0xff) as u8, (index & 0xff) as u8];
        let port = Port { host: host.into(), mac, socket: Arc::new(socket) };
        lock(&self.shared.ports).insert(index, port);
        self.shared.wake.write(1).context("wake the relay")?;
        Ok(())
    }

    /// Frames from a to b so far.
    pub fn counts(&self, a: &str, b: &str) -> Counts {
        lock(&self.shared.counts).get(&(a.to_string(), b.to_string())).copied().unwrap_or_default()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake.write(1).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When a frame is due, its place among those due then, its port and its bytes.
type Flight = (Instant, u64, usize, Vec<u8>);

struct Worker {
    shared: Arc<Shared>,
    /// Frames on their way, the next first.
    queue: BinaryHeap<Reverse<Flight>>,
    sequence: u64,
}

impl Worker {
    fn new(shared: Arc<Shared>) -> Self {
        Self { shared, queue: BinaryHeap::new(), sequence: 0 }
    }

    fn run(&mut self) {
        let mut buffer = vec![MaybeUninit::uninit(); 70_000];
        while !self.shared.stop.load(Ordering::SeqCst) {
            let ports: Vec<(usize, Arc<Socket>)> = lock(&self.shared.ports)
                .iter()
                .map(|(index, port)| (*index, Arc::clone(&port.socket)))
                .collect();
            let timeout = match self.queue.peek() {
                Some(Reverse((due, ..))) => remaining(*due),
                None => PollTimeout::NONE,
            };
            let mut fds = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
            fds.extend(ports.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            poll(&mut fds, timeout).ok();
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready.first() == Some(&true) {
                self.shared.wake.read().ok();
            }
            for ((index, socket), ready) in ports.iter().zip(ready.iter().skip(1)) {
                if *ready {
                    self.drain(*index, socket, &mut buffer);
                }
            }
            self.deliver_due();
        }
    }

    /// Takes up to a batch of frames from one port.
    fn drain(&mut self, from: usize, socket: &Socket, buffer: &mut [MaybeUninit<u8>]) {
        for _ in 0..64 {
            match socket.recv(buffer) {
                Ok(length) => {
                    // SAFETY: recv wrote the first `length` bytes.
                    let frame = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
                    self.forward(from, frame);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // The host is gone, and the port with it; a reboot plugs it in anew.
                    lock(&self.shared.ports).retain(|index, port| {
                        *index != from || !std::ptr::eq(Arc::as_ptr(&port.socket), socket)
                    });
                    return;
                }
            }
        }
    }

    fn forward(&mut self, from: usize, bytes: &[u8]) {
        let Some(mac) = frame::destination(bytes) else { return };
        let shared = Arc::clone(&self.shared);
        let ports = lock(&shared.ports);
        let Some(source) = ports.get(&from).map(|port| port.host.clone()) else { return };
        let length = frame::ip_packet(bytes).map(<[u8]>::len);
        for (index, port) in ports.iter() {
            if *index == from || !(frame::is_group(mac) || port.mac == mac) {
                continue;
            }
            let conditions = lock(&shared.links).between(&source, &port.host);
            let verdict = conditions.judge(length, rand::random::<f64>);
            lock(&shared.counts)
                .entry((source.clone(), port.host.clone()))
                .or_default()
                .add(verdict, conditions.delay);
            match verdict {
                Verdict::Deliver(after) => self.send(*index, after, bytes.to_vec()),
                Verdict::Lost | Verdict::Cut => {}
                Verdict::TooBig(mtu) => match frame::too_big(bytes, mtu) {
                    TooBig::Fragments(parts) => {
                        parts.into_iter().for_each(|part| self.send(*index, conditions.delay, part));
                    }
                    TooBig::Icmp(answer) if !conditions.icmp_dead => {
                        self.send(from, conditions.delay, answer)
                    }
                    TooBig::Icmp(_) | TooBig::Drop => {}
                },
            }
        }
    }

    fn send(&mut self, port: usize, after: Duration, frame: Vec<u8>) {
        self.sequence += 1;
        self.queue.push(Reverse((Instant::now() + after, self.sequence, port, frame)));
    }

    fn deliver_due(&mut self) {
        let now = Instant::now();
        let ports = lock(&self.shared.ports);
        while let Some(Reverse((due, ..))) = self.queue.peek()
            && *due <= now
        {
            if let Some(Reverse((_, _, index, frame))) = self.queue.pop()
                && let Some(port) = ports.get(&index)
            {
                // A full or vanished port loses the frame, as a cable would.
                port.socket.send(&frame).ok();
            }
        }
    }
}

fn remaining(due: Instant) -> PollTimeout {
    let left = due.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
}

/// A packet socket on one interface of the current namespace, for all frames that come in on it.
pub(super) fn packet_socket(interface: &str) -> Result<Socket> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(all))))
        .context("open a packet socket")?;
    let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("find {interface}"))?;
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = i32::try_from(index).context("interface index")?;
    let on: libc::c_int = 1;
    // SAFETY: pointers and lengths describe live values.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        ) | libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            std::mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result != 0 {
        bail!("bind a packet socket to {interface}: {}", io::Error::last_os_error());
    }
    socket.set_nonblocking(true).context("non-blocking socket")?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(16 << 20))
        .context("large receive buffer")?;
    Ok(socket)
}

/// Makes a host's interface send only finished packets of wire size: what the relay reads must be what a
/// real cable would carry.
pub fn finish_packets(netns: &Netns, interface: &str) -> Result<()> {
    netns.run(|| ethtool_off(interface))?.with_context(|| format!("turn off offloads of {interface}"))
}

fn ethtool_off(interface: &str) -> Result<()> {
    // linux/ethtool.h: ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO.
    for command in [0x17u32, 0x1f, 0x24] {
        let mut value = [command, 0];
        let fd = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Datagram,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            None,
        )
        .context("socket for ethtool")?;
        // SAFETY: an all-zero ifreq is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (slot, byte) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        // SAFETY: SIOCETHTOOL reads the two words behind ifru_data, which live until after the call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) } != 0 {
            bail!("ethtool command {command:#x}: {}", io::Error::last_os_error());
        }
    }
    Ok(())
}

//! A capture of every underlay link: nothing but ARP, neighbour discovery and the mesh's UDP port, and never
//! a canary's bytes.
//!
//! Two packet sockets in the wire's namespace, on all its interfaces. The one for *strangers* has a filter in
//! the kernel that leaves out the ports' UDP, so it never falls behind. The one for *content* gets
//! everything and looks for canaries; what it was too slow for is counted and reported.
#![allow(unsafe_code)] // Socket options without a wrapper.

pub mod classify;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::netns::Netns;
use classify::{Class, classify};

/// How many frames of a kind are kept as examples.
const EXAMPLES: usize = 200;

/// What a capture has seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Frames of the mesh's UDP port.
    pub mesh: u64,
    /// ARP, neighbour discovery and its group memberships.
    pub neighbours: u64,
    /// Anything else.
    pub strangers: u64,
    /// Descriptions of the first strangers.
    pub examples: Vec<String>,
    /// Frames with a canary in them, by canary.
    pub canaries: BTreeMap<String, u64>,
    /// Frames per interface index: out of the host on it, and in to it.
    pub links: BTreeMap<i32, (u64, u64)>,
    /// Frames that content inspection was too slow for.
    pub missed: u64,
}

#[derive(Debug)]
struct Shared {
    seen: Mutex<Seen>,
    canaries: Mutex<Vec<Vec<u8>>>,
    wake: EventFd,
}

/// A running capture; ends when dropped.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    /// Interface names by index, as long as they exist.
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures on every interface of the namespace, those to come included. `ports` are the UDP ports of the
    /// mesh; `canaries` must never be seen.
    pub fn start(netns: &Netns, ports: &[u16], canaries: &[&[u8]]) -> Result<Self> {
        let ports = ports.to_vec();
        let (strangers, content) =
            netns.run(|| Ok::<_, anyhow::Error>((socket(&ports)?, socket(&[])?)))??;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("eventfd")?;
        let canaries = Mutex::new(canaries.iter().map(|canary| canary.to_vec()).collect());
        let shared = Arc::new(Shared { seen: Mutex::default(), canaries, wake });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || read(&of_thread, &strangers, &content, &ports))
            .context("start the capture")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What it has seen so far. Frames that are on the wire by now are in it.
    pub fn seen(&self) -> Seen {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Watches out for another canary from now on.
    pub fn watch_for(&self, canary: &[u8]) {
        self.shared.canaries.lock().unwrap_or_else(PoisonError::into_inner).push(canary.to_vec());
    }

    /// Ends the capture, after everything in its buffers has been read.
    pub fn stop(mut self) -> Seen {
        self.finish();
        self.seen()
    }

    fn finish(&mut self) {
        self.shared.wake.write(1).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Seen {
    fn first(&self) -> String {
        self.examples.iter().take(5).cloned().collect::<Vec<_>>().join("\n  ")
    }

    /// Nothing strange and no canary.
    pub fn check(&self) -> Result<()> {
        if self.strangers > 0 {
            bail!("{} frames on the wire are not the mesh's:\n  {}", self.strangers, self.first());
        }
        if let Some((canary, count)) = self.canaries.iter().next() {
            bail!("{count} frames on the wire hold {canary:?} in clear:\n  {}", self.first());
        }
        Ok(())
    }
}

fn read(shared: &Shared, strangers: &Socket, content: &Socket, ports: &[u16]) {
    let mut buffer = vec![0u8; 70_000];
    let mut last = false;
    loop {
        if !last {
            let mut fds = [
                PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(strangers.as_fd(), PollFlags::POLLIN),
                PollFd::new(content.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut fds, PollTimeout::NONE).ok();
            last = fds[0].any().unwrap_or(false);
        }
        // Bounded unless this is the last round, so that neither socket starves the other.
        let limit = if last { usize::MAX } else { 256 };
        for _ in 0..limit {
            let Some((frame, index, out)) = receive(strangers, &mut buffer) else { break };
            let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
            match classify(frame, ports) {
                Class::Mesh => {}
                Class::Neighbour => {}
                Class::Stranger(what) => {
                    seen.strangers += 1;
                    if seen.examples.len() < EXAMPLES {
                        let way = if out { "towards" } else { "from" };
                        seen.examples.push(format!("{way} the host on interface {index}: {what}"));
                    }
                }
            }
        }
        let canaries = shared.canaries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for _ in 0..limit {
            let Some((frame, index, out)) = receive(content, &mut buffer) else { break };
            let found = canaries.iter().find(|canary| contains(frame, canary));
            let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let link = seen.links.entry(index).or_default();
            if out {
                link.1 += 1
            } else {
                link.0 += 1
            }
            match classify(frame, ports) {
                Class::Mesh => seen.mesh += 1,
                Class::Neighbour => seen.neighbours += 1,
                Class::Stranger(_) => {}
            }
            if let Some(canary) = found {
                *seen.canaries.entry(String::from_utf8_lossy(canary).into_owned()).or_default() += 1;
                if seen.examples.len() < EXAMPLES {
                    seen.examples.push(format!("interface {index}: {:?}", classify(frame, ports)));
                }
            }
        }
        let missed = missed(content);
        shared.seen.lock().unwrap_or_else(PoisonError::into_inner).missed += missed;
        if last {
            return;
        }
    }
}

/// One frame: bytes, interface, and whether it goes towards the host behind the interface.
fn receive<'a>(socket: &Socket, buffer: &'a mut [u8]) -> Option<(&'a [u8], i32, bool)> {
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: pointers and lengths describe live buffers.
    let count = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
            (&raw mut from).cast(),
            &raw mut length,
        )
    };
    let frame = buffer.get(..usize::try_from(count).ok()?)?;
    Some((frame, from.sll_ifindex, from.sll_pkttype == libc::PACKET_OUTGOING))
}

fn contains(frame: &[u8], canary: &[u8]) -> bool {
    let Some(first) = canary.first() else { return false };
    let mut rest = frame;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest.get(at..at + canary.len()) == Some(canary) {
            return true;
        }
        rest = rest.get(at + 1..).unwrap_or_default();
    }
    false
}

/// Frames lost for want of buffer since the last call (PACKET_STATISTICS resets on reading).
fn missed(socket: &Socket) -> u64 {
    let mut stats = [0u32; 2]; // tpacket_stats: packets, drops
    let mut length = std::mem::size_of_val(&stats) as libc::socklen_t;
    // SAFETY: the buffer is as long as said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            stats.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 { u64::from(stats[1]) } else { 0 }
}

/// A packet socket on all interfaces. With `ports`, the kernel leaves UDP from and to one of them out.
fn socket(ports: &[u16]) -> Result<Socket> {
    // Protocol 0: nothing arrives before the filter is in place.
    let socket =
        Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0))).context("open a packet socket")?;
    if !ports.is_empty() {
        let program: Vec<SockFilter> =
            filter(ports).iter().map(|op| SockFilter::new(op.code, op.jt, op.jf, op.k)).collect();
        socket.attach_filter(&program).context("attach the capture's filter")?;
    }
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20))
        .context("large receive buffer")?;
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the address lives and is as long as said.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            std::mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound != 0 {
        bail!("bind a packet socket: {}", io::Error::last_os_error());
    }
    Ok(socket)
}

/// Classic BPF: 0 for unfragmented UDP whose both ports are in `ports` (IPv4 without options, IPv6 without
/// extension headers), everything else in full. What it lets through is classified again in user space.
fn filter(ports: &[u16]) -> Vec<libc::sock_filter> {
    const HALF_WORD_AT: u16 = 0x28;
    const BYTE_AT: u16 = 0x30;
    const EQUAL: u16 = 0x15;
    const ANY_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let op = |code: u16, jt: u8, jf: u8, k: u32| libc::sock_filter { code, jt, jf, k };
    // Goes on if the field has one of the values, else takes the whole frame.
    let one_of = |load: u16, offset: u32, values: &[u32]| {
        let mut ops = vec![op(load, 0, 0, offset)];
        for (index, value) in values.iter().enumerate() {
            ops.push(op(EQUAL, (values.len() - index) as u8, 0, *value));
        }
        ops.push(op(RETURN, 0, 0, u32::MAX));
        ops
    };
    let ports: Vec<u32> = ports.iter().map(|port| u32::from(*port)).collect();
    let family = |kind: u32, ops: Vec<libc::sock_filter>| {
        let mut block = vec![op(HALF_WORD_AT, 0, 0, 12), op(EQUAL, 0, ops.len() as u8 + 1, kind)];
        block.extend(ops);
        block.push(op(RETURN, 0, 0, 0));
        block
    };
    let no_fragment = vec![op(HALF_WORD_AT, 0, 0, 20), op(ANY_BIT, 0, 1, 0x3fff), op(RETURN, 0, 0, u32::MAX)];
    let v4 = [
        one_of(BYTE_AT, 14, &[0x45]),
        one_of(BYTE_AT, 23, &[17]),
        no_fragment,
        one_of(HALF_WORD_AT, 34, &ports),
        one_of(HALF_WORD_AT, 36, &ports),
    ];
    let v6 = [one_of(BYTE_AT, 20, &[17]), one_of(HALF_WORD_AT, 54, &ports), one_of(HALF_WORD_AT, 56, &ports)];
    let mut program = family(0x0800, v4.concat());
    program.extend(family(0x86dd, v6.concat()));
    program.push(op(RETURN, 0, 0, u32::MAX));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's interpreter would do with the program (networking/filter.rst).
    fn run(program: &[libc::sock_filter], frame: &[u8]) -> u32 {
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let op = program[at];
            let k = op.k as usize;
            at += 1;
            match op.code {
                0x28 => match frame.get(k..k + 2) {
                    Some(b) => a = u32::from(u16::from_be_bytes([b[0], b[1]])),
                    None => return 0,
                },
                0x30 => match frame.get(k) {
                    Some(b) => a = u32::from(*b),
                    None => return 0,
                },
                0x15 => at += usize::from(if a == op.k { op.jt } else { op.jf }),
                0x45 => at += usize::from(if a & op.k != 0 { op.jt } else { op.jf }),
                0x06 => return op.k,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    #[test]
    fn the_filter_leaves_out_exactly_the_meshs_datagrams() {
        let program = filter(&[51820, 51821]);
        let v4 = |protocol: u8, fragment: u16, from: u16, to: u16| {
            let mut frame = vec![0; 14 + 28];
            frame[12..14].copy_from_slice(&[8, 0]);
            frame[14] = 0x45;
            frame[20..22].copy_from_slice(&fragment.to_be_bytes());
            frame[23] = protocol;
            frame[34..36].copy_from_slice(&from.to_be_bytes());
            frame[36..38].copy_from_slice(&to.to_be_bytes());
            frame
        };
        assert_eq!(run(&program, &v4(17, 0x4000, 51820, 51821)), 0);
        for frame in
            [v4(6, 0, 51820, 51820), v4(17, 1, 51820, 51820), v4(17, 0, 51820, 9), v4(17, 0, 9, 51820)]
        {
            assert_eq!(run(&program, &frame), u32::MAX);
        }
        let mut v6 = vec![0; 14 + 48];
        v6[12..14].copy_from_slice(&[0x86, 0xdd]);
        v6[20] = 17;
        v6[54..58].copy_from_slice(&[0xca, 0x6c, 0xca, 0x6d]);
        assert_eq!(run(&program, &v6), 0);
        v6[20] = 58;
        assert_eq!(run(&program, &v6), u32::MAX);
        let mut arp = vec![0; 60];
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(run(&program, &arp), u32::MAX);
    }

    #[test]
    fn a_canary_is_found_wherever_it_is() {
        assert!(contains(b"aabcanaryx", b"canary"));
        assert!(contains(b"cacanary", b"canary"));
        assert!(!contains(b"canarcanar", b"canary"));
    }
}

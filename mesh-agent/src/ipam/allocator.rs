//! Which address next: one never given out if there is one, else the one that has been free for longest.
//! Pure; time is the order of the calls.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::journal::State;
use super::lease::{Key, Lease};

/// Freed addresses remembered; beyond that the oldest count as never given out. An IPv6 range is larger
/// than any memory.
const REMEMBERED: usize = 65_536;

/// Addresses handed out and addresses given back.
#[derive(Debug, Clone, Default)]
pub struct Allocator {
    used: BTreeMap<IpAddr, Key>,
    freed: BTreeMap<IpAddr, u64>,
    order: BTreeMap<u64, IpAddr>,
    /// Number of frees so far.
    clock: u64,
}

impl Allocator {
    /// As the journal has it.
    pub fn new(state: &State) -> Self {
        let mut allocator = Self::default();
        for ip in &state.freed {
            allocator.remember(*ip);
        }
        for lease in state.leases.values() {
            allocator.take(lease);
        }
        allocator
    }

    /// How many are handed out.
    pub fn used(&self) -> usize {
        self.used.len()
    }

    /// Those handed out.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.used.keys().copied()
    }

    /// Who has it.
    pub fn owner(&self, ip: IpAddr) -> Option<&Key> {
        self.used.get(&ip)
    }

    /// Those given back, the longest free first.
    pub fn freed(&self) -> impl Iterator<Item = IpAddr> {
        self.order.values().copied()
    }

    /// The lease's addresses are its own now.
    pub fn take(&mut self, lease: &Lease) {
        for ip in &lease.ips {
            self.used.insert(*ip, lease.key());
            if let Some(at) = self.freed.remove(ip) {
                self.order.remove(&at);
            }
        }
    }

    /// They are nobody's again.
    pub fn free(&mut self, lease: &Lease) {
        for ip in &lease.ips {
            self.used.remove(ip);
            self.remember(*ip);
        }
    }

    fn remember(&mut self, ip: IpAddr) {
        self.clock += 1;
        if let Some(at) = self.freed.insert(ip, self.clock) {
            self.order.remove(&at);
        }
        self.order.insert(self.clock, ip);
        if self.order.len() > REMEMBERED
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.freed.remove(&oldest);
        }
    }

    /// The address of `cidr` to hand out next; `blocked` ones are passed over.
    pub fn choose(&self, cidr: &IpNet, blocked: &dyn Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let (first, last) = hosts(cidr)?;
        let is_fresh =
            |ip: &IpAddr| !self.used.contains_key(ip) && !self.freed.contains_key(ip) && !blocked(*ip);
        let fresh = (first..=last).map(|bits| address(cidr, bits)).find(is_fresh);
        fresh.or_else(|| {
            self.freed().find(|ip| is_host(cidr, *ip) && !self.used.contains_key(ip) && !blocked(*ip))
        })
    }
}

/// First and last address for pods: not the network, not the tunnel's (network + 1), not IPv4's broadcast.
fn hosts(cidr: &IpNet) -> Option<(u128, u128)> {
    let network = bits(cidr.network());
    let last = bits(cidr.broadcast());
    let last = if cidr.addr().is_ipv4() { last.checked_sub(1)? } else { last };
    let first = network.checked_add(2)?;
    (first <= last).then_some((first, last))
}

/// Whether `ip` may be a pod's in `cidr`.
pub fn is_host(cidr: &IpNet, ip: IpAddr) -> bool {
    cidr.contains(&ip) && hosts(cidr).is_some_and(|(first, last)| (first..=last).contains(&bits(ip)))
}

/// How many pods fit; `None` for more than a `u64` counts.
pub fn size(cidr: &IpNet) -> Option<u64> {
    match hosts(cidr) {
        Some((first, last)) => u64::try_from(last - first).ok()?.checked_add(1),
        None => Some(0),
    }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn address(cidr: &IpNet, bits: u128) -> IpAddr {
    match cidr {
        // The range of an IPv4 prefix has 32 bits.
        IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
        IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

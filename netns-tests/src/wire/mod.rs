//! The underlay: one network namespace with a port per host, joined by a kernel bridge while every link is
//! clean and by the lab's own relay when one is not (this kernel may have no netem).

pub mod frame;
pub mod impair;
pub mod relay;
pub mod tap;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use crate::bins::Bins;
use crate::host::Host;
use crate::netns::Netns;
use impair::{Conditions, Links};
use relay::Relay;

/// The address hosts send to when they know no better: nobody has it, so that a leaked packet shows on the
/// wire. (Documentation ranges, RFC 5737 and RFC 3849.)
pub const GATEWAYS: [&str; 2] = ["203.0.113.254", "2001:db8:ffff::fe"];
const GATEWAY_MAC: &str = "02:4d:67:ff:ff:fe";

/// The wire's namespace and what joins its ports.
#[derive(Debug)]
pub struct Wire {
    host: Host,
    ports: BTreeMap<String, usize>,
    next: usize,
    /// The far end of each port: a host's (or router's) namespace and interface.
    ends: BTreeMap<String, (Netns, String)>,
    links: Arc<Mutex<Links>>,
    relay: Option<Relay>,
}

impl Wire {
    /// An empty wire. `links` says what is wrong with which link; none means a plain bridge.
    pub fn start(bins: &Bins, links: Links) -> Result<Self> {
        let host = Host::start("wire", bins)?;
        // The wire itself stays silent: no router solicitations or multicast reports of its own.
        for scope in ["all", "default"] {
            host.netns().sysctl(&format!("ipv6/conf/{scope}/disable_ipv6"), "1")?;
        }
        let lines = ["link add bridge type bridge mcast_snooping 0 stp_state 0", "link set bridge up"];
        host.netns().ip(&lines.map(String::from))?;
        let clean = links.is_clean();
        let links = Arc::new(Mutex::new(links));
        let mut wire =
            Self { host, ports: BTreeMap::new(), next: 0, ends: BTreeMap::new(), links, relay: None };
        if !clean {
            wire.engage()?;
        }
        Ok(wire)
    }

    /// The namespace of the underlay's ports: where to capture.
    pub fn netns(&self) -> &Netns {
        self.host.netns()
    }

    /// Name of a host's port in the wire's namespace.
    pub fn port(&self, host: &str) -> Option<String> {
        self.ports.get(host).map(|index| format!("port{index}"))
    }

    /// Ports by name with the host on each.
    pub fn hosts_by_port(&self) -> BTreeMap<String, String> {
        self.ports.iter().map(|(host, index)| (format!("port{index}"), host.clone())).collect()
    }

    /// Plugs a cable between the wire and interface `eth0` of a host, both ends still down. A host that was
    /// plugged in before (and died) gets its MAC address back.
    pub fn plug(&mut self, name: &str, netns: &Host, interface: &str) -> Result<()> {
        let index = *self.ports.entry(name.to_string()).or_insert_with(|| {
            self.next += 1;
            self.next
        });
        let mac = mac(index);
        let pid = netns.pid();
        if self.ends.insert(name.to_string(), (netns.netns().clone(), interface.to_string())).is_some() {
            // The kernel takes a dead host's cable away in its own time.
            self.netns().command("ip").args(["link", "del", &format!("port{index}")]).output().ok();
        }
        self.netns().ip(&[format!(
            "link add port{index} type veth peer name {interface} address {mac} netns {pid}"
        )])?;
        if let Some(relay) = &self.relay {
            relay::finish_packets(netns.netns(), interface)?;
            self.netns().ip(&[format!("link set port{index} up")])?;
            relay.plug(self.host.netns(), index, name)
        } else {
            self.netns().ip(&[format!("link set port{index} master bridge up")])
        }
    }

    /// Lines for `ip -batch` that give a plugged interface its addresses, and routes to everybody else on the
    /// wire; all else goes to a gateway that nobody is.
    pub fn addressing(interface: &str, own: &[IpAddr], others: &[IpAddr], gateway: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for address in own {
            let nodad = if address.is_ipv6() { " nodad" } else { "" };
            lines.push(format!("addr add {} dev {interface}{nodad}", host_prefix(*address)));
        }
        lines.push(format!("link set {interface} up"));
        for address in others {
            if own.iter().any(|mine| mine.is_ipv4() == address.is_ipv4()) {
                lines.push(format!("route replace {} dev {interface}", host_prefix(*address)));
            }
        }
        for gw in GATEWAYS.iter().filter_map(|gw| gw.parse::<IpAddr>().ok()).filter(|_| gateway) {
            if own.iter().any(|mine| mine.is_ipv4() == gw.is_ipv4()) {
                lines.push(format!("neigh replace {gw} lladdr {GATEWAY_MAC} nud permanent dev {interface}"));
                lines.push(format!("route replace {} dev {interface}", host_prefix(gw)));
                lines.push(format!("route replace default via {gw} dev {interface} onlink"));
            }
        }
        lines
    }

    /// Changes the conditions between two hosts, both directions, while everything runs.
    pub fn change(&mut self, a: &str, b: &str, change: impl Fn(&mut Conditions)) -> Result<()> {
        self.change_one_way(a, b, &change)?;
        self.change_one_way(b, a, &change)
    }

    /// Changes the conditions from one host to another, and not those of the way back.
    pub fn change_one_way(&mut self, from: &str, to: &str, change: impl Fn(&mut Conditions)) -> Result<()> {
        change(self.links.lock().unwrap_or_else(std::sync::PoisonError::into_inner).between_mut(from, to));
        self.engage()
    }

    /// Cuts (or heals) the link between two hosts.
    pub fn cut(&mut self, a: &str, b: &str, cut: bool) -> Result<()> {
        self.change(a, b, |conditions| conditions.cut = cut)
    }

    /// What the relay has done so far with frames between two hosts, a to b.
    pub fn counts(&self, a: &str, b: &str) -> impair::Counts {
        self.relay.as_ref().map(|relay| relay.counts(a, b)).unwrap_or_default()
    }

    /// Replaces the bridge by the relay, if it has not been yet.
    fn engage(&mut self) -> Result<()> {
        if self.relay.is_some() {
            return Ok(());
        }
        let relay = Relay::start(Arc::clone(&self.links))?;
        for (name, index) in &self.ports {
            if let Some((netns, interface)) = self.ends.get(name) {
                relay::finish_packets(netns, interface)?;
            }
            self.netns().ip(&[format!("link set port{index} nomaster")])?;
            relay.plug(self.host.netns(), *index, name)?;
        }
        self.relay = Some(relay);
        Ok(())
    }
}

/// MAC address of the host on a port.
pub fn mac(index: usize) -> String {
    format!("02:4d:67:00:{:02x}:{:02x}", index >> 8 & 0xff, index & 0xff)
}

/// `1.2.3.4/32` or `::1/128`.
pub fn host_prefix(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// A NAT router between the wire and one host (see [`crate::spec::Nat`]).
#[derive(Debug)]
pub struct Router {
    /// Its namespaces.
    pub host: Host,
}

impl Router {
    /// Plugs a router into the wire and `inner` into the router: `inner` has private addresses, the wire sees
    /// the router's public ones.
    pub fn start(
        bins: &Bins,
        wire: &mut Wire,
        inner: &Host,
        private: &[IpAddr],
        public: &[IpAddr],
        others: &[IpAddr],
    ) -> Result<Self> {
        let host = Host::start(&format!("nat-{}", inner.name()), bins)?;
        wire.plug(inner.name(), &host, "wan0")?;
        host.netns().sysctl("ipv4/ip_forward", "1")?;
        host.netns().sysctl("ipv6/conf/all/forwarding", "1")?;
        host.netns().ip(&Wire::addressing("wan0", public, others, true))?;
        let pid = inner.pid();
        let mut lines = vec![
            format!("link add lan0 type veth peer name eth0 netns {pid}"),
            "addr add 169.254.99.1/32 dev lan0".to_string(),
            "addr add fe80::1/64 dev lan0 nodad".to_string(),
            "link set lan0 up".to_string(),
        ];
        lines.extend(private.iter().map(|own| format!("route add {} dev lan0", host_prefix(*own))));
        host.netns().ip(&lines)?;
        let mut lines = Wire::addressing("eth0", private, &[], false);
        for own in private {
            let via = if own.is_ipv4() { "169.254.99.1" } else { "fe80::1" };
            lines.push(format!("route add default via {via} dev eth0 onlink"));
        }
        inner.netns().ip(&lines)?;
        let rules = "table inet nat { chain post { type nat hook postrouting priority 100; oifname wan0 masquerade; }; \
                     chain in { type filter hook forward priority 0; iifname wan0 ct state new drop; }; }";
        host.run(&["nft", rules]).context("set up the NAT router")?;
        Ok(Self { host })
    }
}

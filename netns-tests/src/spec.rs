//! The lab file: hosts, pods, policies, and what is wrong with the cables between them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::wire::impair::{Conditions, Links};

/// A lab.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lab {
    /// Name, for `mesh-lab exec --lab NAME`.
    pub name: String,
    /// Hosts that run the agent and the datapath.
    pub nodes: Vec<Node>,
    /// Hosts on the underlay that are no part of the mesh.
    #[serde(default)]
    pub externals: Vec<External>,
    /// An API server: the cluster's objects are there, and in no manifest directory.
    #[serde(default)]
    pub api_server: Option<ApiServer>,
    /// Namespaces; one that a pod names and this list does not has no labels but its name.
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    /// Pods.
    #[serde(default)]
    pub pods: Vec<Pod>,
    /// NetworkPolicies (any Kubernetes objects), as written in a manifest.
    #[serde(default)]
    pub policies: Vec<Value>,
    /// A directory of manifests (relative to the lab file) that every host gets too, or the API server if there is one.
    #[serde(default)]
    pub manifests: Option<PathBuf>,
    /// The cables.
    #[serde(default)]
    pub underlay: Underlay,
    /// `spec` of the MeshConfiguration; without pools the nodes' pod ranges are the pools.
    #[serde(default)]
    pub mesh: BTreeMap<String, Value>,
}

/// A node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Node {
    /// Name and host name.
    pub name: String,
    /// Its addresses on the underlay, InternalIPs of the Node object.
    pub ips: Vec<IpAddr>,
    /// Pod ranges.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What carries its packets.
    #[serde(default)]
    pub datapath: Datapath,
}

/// What carries a node's packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Datapath {
    /// Ours.
    #[default]
    MeshDatapath,
    /// wireguard-go, driven by our agent.
    WireguardGo,
    /// Whatever a virtual machine has, which the test boots itself (see [`crate::guest`]): nothing of the mesh runs on
    /// the lab's host of that name.
    Guest,
}

/// A host that is no node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct External {
    /// Name.
    pub name: String,
    /// Its addresses on the underlay.
    pub ips: Vec<IpAddr>,
}

/// The host of the API server, which is no node. Its name is [`API_SERVER`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApiServer {
    /// Its addresses on the underlay; the first is the one it advertises.
    pub ips: Vec<IpAddr>,
}

/// Name of the API server's host.
pub const API_SERVER: &str = "apiserver";

/// A namespace.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The node it is on.
    pub node: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Exact addresses; none means what IPAM gives.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// Where an echo server listens (TCP and UDP echo what they get, SCTP answers INIT).
    #[serde(default)]
    pub ports: Vec<Port>,
    /// It shares its node's network.
    #[serde(default)]
    pub host_network: bool,
}

/// A listening port.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    /// Name in the pod's spec, may be empty.
    #[serde(default)]
    pub name: String,
    /// Number.
    pub port: u16,
    /// TCP (default), UDP or SCTP.
    #[serde(default)]
    pub protocol: Protocol,
    /// False: it listens, but the pod's spec does not say so.
    #[serde(default = "yes")]
    pub declared: bool,
}

fn yes() -> bool {
    true
}

/// A transport protocol that policies know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// The cables between the hosts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Underlay {
    /// How every link is unless `links` says otherwise.
    #[serde(default, flatten)]
    pub every: Hop,
    /// Pairs of hosts whose link is different, both directions.
    #[serde(default)]
    pub links: Vec<Link>,
    /// Hosts behind a NAT router.
    #[serde(default)]
    pub nat: Vec<Nat>,
}

/// What a hop does to packets.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    /// Largest IP packet, bytes.
    pub mtu: Option<u32>,
    /// No ICMP when a packet is too big.
    pub icmp_dead: Option<bool>,
    /// One way, milliseconds.
    pub delay_ms: Option<f64>,
    /// Lost packets, per cent.
    pub loss_percent: Option<f64>,
    /// Packets that others overtake, per cent.
    pub reorder_percent: Option<f64>,
    /// Nothing gets through.
    pub cut: Option<bool>,
}

/// A link that is different.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Link {
    /// Two hosts.
    pub between: [String; 2],
    /// How it is; what is not said is as everywhere.
    #[serde(flatten)]
    pub hop: Hop,
}

/// A host behind a router with masquerade; its own addresses are the private ones.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Nat {
    /// The host.
    pub host: String,
    /// The router's addresses on the underlay.
    pub public: Vec<IpAddr>,
}

impl Hop {
    fn over(&self, base: Conditions, field: &str) -> Result<Conditions> {
        let share = |value: Option<f64>, base: f64, name: &str| match value {
            None => Ok(base),
            Some(percent) if (0.0..=100.0).contains(&percent) => Ok(percent / 100.0),
            Some(percent) => bail!("{field}.{name}: {percent} is not a percentage (0 to 100)"),
        };
        let delay = match self.delay_ms {
            None => base.delay,
            Some(ms) if (0.0..=60_000.0).contains(&ms) => Duration::from_micros((ms * 1000.0) as u64),
            Some(ms) => bail!("{field}.delayMs: {ms} is not between 0 and 60000"),
        };
        if let Some(mtu) = self.mtu {
            ensure!((68..=65_535).contains(&mtu), "{field}.mtu: {mtu} is not between 68 and 65535");
        }
        Ok(Conditions {
            mtu: self.mtu.or(base.mtu),
            icmp_dead: self.icmp_dead.unwrap_or(base.icmp_dead),
            delay,
            loss: share(self.loss_percent, base.loss, "lossPercent")?,
            reorder: share(self.reorder_percent, base.reorder, "reorderPercent")?,
            cut: self.cut.unwrap_or(base.cut),
        })
    }
}

impl Underlay {
    /// The conditions of every link.
    pub fn conditions(&self) -> Result<Links> {
        let default = self.every.over(Conditions::default(), "underlay")?;
        let mut links = Links::new(default);
        for (index, link) in self.links.iter().enumerate() {
            let hop = link.hop.over(default, &format!("underlay.links[{index}]"))?;
            let [a, b] = &link.between;
            *links.between_mut(a, b) = hop;
            *links.between_mut(b, a) = hop;
        }
        Ok(links)
    }
}

impl Lab {
    /// Reads and checks a lab file; an error names the file and the field.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let mut lab = Self::parse(&text).with_context(|| path.display().to_string())?;
        if let (Some(manifests), Some(parent)) = (&mut lab.manifests, path.parent()) {
            *manifests = parent.join(&manifests);
            ensure!(
                manifests.is_dir(),
                "{}: manifests: {} is not a directory",
                path.display(),
                manifests.display()
            );
        }
        Ok(lab)
    }

    /// Parses and checks a lab file's text.
    pub fn parse(text: &str) -> Result<Self> {
        let lab: Self = serde_saphyr::from_str(text)?;
        lab.check()?;
        Ok(lab)
    }

    /// Names are there, unique and usable, and refer to something.
    pub fn check(&self) -> Result<()> {
        label(&self.name).context("name")?;
        ensure!(!self.nodes.is_empty(), "nodes: a lab needs at least one");
        let (mut hosts, mut ips) = (BTreeSet::new(), BTreeSet::new());
        let nodes = self.nodes.iter().enumerate().map(|(i, n)| (format!("nodes[{i}]"), &n.name, &n.ips));
        let externals =
            self.externals.iter().enumerate().map(|(i, e)| (format!("externals[{i}]"), &e.name, &e.ips));
        let server = self.api_server.iter().map(|server| ("apiServer".to_owned(), &server.ips));
        let hosts_of_file = nodes.chain(externals).map(|(field, name, ips)| (field, name.as_str(), ips));
        for (field, name, addresses) in
            hosts_of_file.chain(server.map(|(field, ips)| (field, API_SERVER, ips)))
        {
            label(name).with_context(|| format!("{field}.name"))?;
            ensure!(name != "wire", "{field}.name: `wire` is the lab's own");
            ensure!(hosts.insert(name), "{field}.name: {name} is there twice");
            ensure!(!addresses.is_empty(), "{field}.ips: a host needs an address");
            for ip in addresses {
                ensure!(ips.insert(*ip), "{field}.ips: {ip} is there twice");
            }
        }
        let known = |field: String, host: &str| {
            ensure!(hosts.contains(host), "{field}: there is no host {host}");
            Ok(())
        };
        let mut pods = BTreeSet::new();
        for (i, pod) in self.pods.iter().enumerate() {
            label(&pod.namespace).with_context(|| format!("pods[{i}].namespace"))?;
            label(&pod.name).with_context(|| format!("pods[{i}].name"))?;
            ensure!(
                pods.insert((&pod.namespace, &pod.name)),
                "pods[{i}]: {}/{} is there twice",
                pod.namespace,
                pod.name
            );
            ensure!(
                self.nodes.iter().any(|node| node.name == pod.node),
                "pods[{i}].node: there is no node {}",
                pod.node
            );
        }
        for (i, link) in self.underlay.links.iter().enumerate() {
            for host in &link.between {
                known(format!("underlay.links[{i}].between"), host)?;
            }
        }
        for (i, nat) in self.underlay.nat.iter().enumerate() {
            known(format!("underlay.nat[{i}].host"), &nat.host)?;
            ensure!(!nat.public.is_empty(), "underlay.nat[{i}].public: the router needs an address");
        }
        self.underlay.conditions().map(drop)
    }

    /// The pools: those of `mesh`, or the nodes' pod ranges and the pods' addresses outside them.
    pub fn pools(&self) -> Value {
        if let Some(pools) = self.mesh.get("pools") {
            return pools.clone();
        }
        let ranges = self.nodes.iter().flat_map(|node| node.pod_cidrs.clone());
        let pods = self.pods.iter().filter(|pod| !pod.host_network).flat_map(|pod| pod.ips.clone());
        // Pools are disjoint; that two nodes claim the same range is for the mesh to judge.
        let pools = IpNet::aggregate(&ranges.chain(pods.map(IpNet::from)).collect());
        Value::Array(pools.iter().map(|pool| serde_json::json!({ "cidr": pool })).collect())
    }
}

/// A name as Kubernetes wants it (RFC 1123 label), short enough for a host name.
fn label(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        !name.is_empty()
            && name.len() <= 63
            && name.chars().all(fine)
            && !name.starts_with('-')
            && !name.ends_with('-'),
        "{name:?} is not a name (lower-case letters, digits and dashes)"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
name: x
nodes:
  - {name: a, ips: [192.0.2.1], podCIDRs: [10.1.0.0/24]}
  - {name: b, ips: [192.0.2.2], podCIDRs: [10.2.0.0/24]}
underlay:
  delayMs: 2
  links:
    - {between: [a, b], lossPercent: 5, mtu: 1400}
pods:
  - {namespace: d, name: p, node: a, ports: [{port: 80}, {port: 53, protocol: UDP, name: dns}]}
";

    #[test]
    fn a_link_overrides_what_it_says_and_keeps_the_rest() {
        let lab = Lab::parse(GOOD).unwrap();
        let links = lab.underlay.conditions().unwrap();
        let link = links.between("b", "a");
        assert_eq!((link.delay, link.loss, link.mtu), (Duration::from_millis(2), 0.05, Some(1400)));
        assert_eq!(links.between("a", "c").loss, 0.0);
        assert_eq!(lab.pods[0].ports[0].protocol, Protocol::Tcp);
    }

    #[test]
    fn pools_hold_every_pod_and_are_disjoint() {
        let text =
            GOOD.replace("10.2.0.0/24", "10.1.0.128/25").replace("node: a,", "node: a, ips: [10.7.0.1],");
        assert_eq!(
            Lab::parse(&text).unwrap().pools(),
            serde_json::json!([{ "cidr": "10.1.0.0/24" }, { "cidr": "10.7.0.1/32" }])
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, word) in [
            ("name: x", "name: X_", "name"),
            ("node: a", "node: z", "pods[0].node"),
            ("lossPercent: 5", "lossPercent: 500", "links[0].lossPercent"),
            ("192.0.2.2", "192.0.2.1", "nodes[1].ips"),
            ("between: [a, b]", "between: [a, z]", "links[0].between"),
            ("underlay:", "apiServer: {ips: [192.0.2.1]}\nunderlay:", "apiServer.ips"),
            ("underlay:", "apiServer: {}\nunderlay:", "ips"),
            (
                "underlay:",
                "externals: [{name: apiserver, ips: [192.0.2.8]}]\napiServer: {ips: [192.0.2.9]}\nunderlay:",
                "apiServer.name",
            ),
            ("mtu: 1400", "mtoo: 1400", "mtoo"),
            ("delayMs: 2", "delay: 2", "delay"),
            ("podCIDRs: [10.2", "podCidrs: [10.2", "podCidrs"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD);
            let error = format!("{:#}", Lab::parse(&text).unwrap_err());
            assert!(error.contains(word), "{error:?} does not name {word}");
        }
    }
}

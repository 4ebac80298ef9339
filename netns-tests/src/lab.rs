//! A running lab: hosts on a wire, each with agent and datapath, and the pods on them.

mod cluster;
mod pods;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_api::defaults::{CONFIG, DEVICE, DEVICES, MANIFESTS};
use mesh_api::status::{Status, Synced};
use serde_json::Value;

use crate::agent::Agent;
use crate::bins::Bins;
use crate::carrier::Carrier;
use crate::host::Host;
use crate::manifests::{self, PodStatus};
use crate::pods::Pod;
use crate::probe::server::Server;
use crate::spec::{self, API_SERVER};
use crate::wait;
use crate::wire::{Router, Wire};

/// How long anything in the control plane may take before the lab calls it broken.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The units of a node: a datapath for each device, and the agent.
pub const UNITS: [&str; 3] = ["mesh-datapath", "mesh-datapath@margay1", "mesh-agent"];

/// The lab. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Lab {
    spec: spec::Lab,
    bins: Bins,
    // Dropped in this order: nobody reads a dead host's files, the hosts go before the wire they talk on.
    carrier: Carrier,
    server: Server,
    pods: BTreeMap<(String, String), Pod>,
    hosts: BTreeMap<String, Host>,
    routers: BTreeMap<String, Router>,
    /// What the cluster says, by file name: every node's manifest directory holds exactly this and `nodes/`.
    objects: BTreeMap<String, Value>,
    wire: Wire,
}

impl Lab {
    /// An empty wire and namespaces for every host, plugged in but without any address: what a capture wants
    /// to see from its first frame.
    pub fn plug(spec: spec::Lab, bins: &Bins) -> Result<Self> {
        spec.check()?;
        let wire = Wire::start(bins, spec.underlay.conditions()?)?;
        let mut lab = Self {
            carrier: Carrier::start()?,
            server: Server::start()?,
            pods: BTreeMap::new(),
            hosts: BTreeMap::new(),
            routers: BTreeMap::new(),
            objects: BTreeMap::new(),
            wire,
            bins: bins.clone(),
            spec,
        };
        for name in lab.host_names() {
            let host = Host::start(&name, bins)?;
            if !lab.spec.underlay.nat.iter().any(|nat| nat.host == name) {
                lab.wire.plug(&name, &host, "eth0")?;
            }
            lab.hosts.insert(name, host);
        }
        Ok(lab)
    }

    /// The whole lab: addresses, programs, pods; ready when every node's agent has carried out everything.
    pub fn up(spec: spec::Lab, bins: &Bins) -> Result<Self> {
        let mut lab = Self::plug(spec, bins)?;
        lab.address()?;
        lab.start_mesh()?;
        lab.settle(PATIENCE)?;
        lab.start_pods()?;
        Ok(lab)
    }

    /// Gives all hosts their addresses and routes.
    pub fn address(&mut self) -> Result<()> {
        let mut names = self.host_names();
        names.retain(|name| !self.is_guest(name));
        for name in names {
            self.address_host(&name)?;
        }
        Ok(())
    }

    fn address_host(&mut self, name: &str) -> Result<()> {
        let own = self.ips(name)?;
        let others = self.underlay_ips_but(name);
        let host = self.hosts.get(name).with_context(|| format!("no host {name}"))?;
        if let Some(nat) = self.spec.underlay.nat.iter().find(|nat| nat.host == name) {
            let router = Router::start(&self.bins, &mut self.wire, host, &own, &nat.public, &others)?;
            self.routers.insert(name.into(), router);
            return Ok(());
        }
        host.netns().ip(&Wire::addressing("eth0", &own, &others, true))
    }

    /// Writes the cluster's objects and starts datapath and agent on every node.
    pub fn start_mesh(&mut self) -> Result<()> {
        self.write_cluster()?;
        for name in self.node_names() {
            self.start_node(&name)?;
        }
        Ok(())
    }

    /// Writes what the cluster says of nodes, namespaces and so on: to the API server, which it starts, if the lab has
    /// one, else for the nodes' manifest directories.
    pub fn write_cluster(&mut self) -> Result<()> {
        if self.spec.api_server.is_some() {
            self.start_cluster()?;
        }
        let mut objects = vec![manifests::mesh(&self.spec)];
        objects.extend(self.spec.nodes.iter().map(manifests::node));
        let mut namespaces = self.spec.namespaces.clone();
        for pod in &self.spec.pods {
            if !namespaces.iter().any(|namespace| namespace.name == pod.namespace) {
                namespaces.push(spec::Namespace { name: pod.namespace.clone(), ..Default::default() });
            }
        }
        objects.extend(namespaces.iter().map(manifests::namespace));
        objects.extend(self.spec.policies.iter().cloned());
        for object in objects {
            if self.spec.api_server.is_some() {
                self.put(object)?;
            } else {
                self.objects.insert(manifests::file_name(&object), object);
            }
        }
        self.apply_manifests()
    }

    /// Puts a node's files in place, as whoever installs it would.
    pub fn write_node(&self, name: &str) -> Result<()> {
        let host = self.host(name)?;
        host.write("/etc/cni/net.d/10-margay.conflist", crate::pods::conflist().to_string().as_bytes())?;
        if self.spec.api_server.is_some() {
            return self.join_cluster(name);
        }
        host.write(CONFIG, format!("nodeName: {name}\n").as_bytes())?;
        for (file, object) in &self.objects {
            host.write(&format!("{MANIFESTS}/{file}"), &serde_json::to_vec_pretty(object)?)?;
        }
        if let Some(directory) = &self.spec.manifests {
            crate::mounts::copy_tree(directory, &host.path(&format!("{MANIFESTS}/extra")))?;
        }
        self.carrier.add(host);
        Ok(())
    }

    /// Puts a node's files in place and starts its units, as a boot would.
    fn start_node(&self, name: &str) -> Result<()> {
        self.write_node(name)?;
        if self.is_guest(name) {
            return Ok(());
        }
        for device in DEVICES {
            self.start_device(name, device)?;
        }
        self.start_agent(name)
    }

    /// Starts the unit of the first device, `mesh-datapath`.
    pub fn start_datapath(&self, node: &str) -> Result<()> {
        self.start_device(node, DEVICE)
    }

    /// Starts a device's unit, with the arguments of `manifests/systemd/mesh-datapath@.service`.
    pub fn start_device(&self, node: &str, device: &str) -> Result<()> {
        let host = self.host(node)?;
        if self.spec.nodes.iter().any(|of| of.name == node && of.datapath == spec::Datapath::WireguardGo) {
            return host.start_unit(&datapath_unit(device), &["wireguard-go", "-f", device]);
        }
        let datapath = self.bins.program("mesh-datapath")?;
        let argv = [&datapath.to_string_lossy(), "--foreground", "--supervise", "--persist", device];
        host.start_unit(&datapath_unit(device), &argv)
    }

    /// Starts the agent's unit.
    pub fn start_agent(&self, node: &str) -> Result<()> {
        let agent = self.bins.program("mesh-agent")?;
        self.host(node)?.start_unit("mesh-agent", &[&agent.to_string_lossy()])
    }

    /// Waits until every agent knows every other node and has carried out everything.
    pub fn settle(&self, limit: Duration) -> Result<()> {
        for name in self.node_names().iter().filter(|name| !self.is_guest(name)) {
            self.settle_node(name, limit)?;
        }
        Ok(())
    }

    /// Waits until one agent knows every other node and has carried out everything.
    pub fn settle_node(&self, name: &str, limit: Duration) -> Result<()> {
        let agent = self.agent(name)?;
        let peers = self.spec.nodes.len() - 1;
        wait::until(format!("node {name} to settle"), limit, || {
            let status = agent.status()?;
            let generation = status.generation;
            if status.devices.iter().any(|device| device.public_key.is_some() && device.state == "up")
                && status.peers.len() == peers
                && generation.snapshot > 0
                && generation.enforced >= generation.snapshot
                && generation.policy >= generation.snapshot
            {
                return Ok(Some(()));
            }
            bail!("{}", unsettled(&status))
        })
        .with_context(|| self.logs(name))
    }

    /// Ends of the logs of a node's units, for the reader of an error.
    pub fn logs(&self, node: &str) -> String {
        let Ok(host) = self.host(node) else { return String::new() };
        let mut text = String::new();
        for unit in UNITS {
            let log = host.log(unit);
            let lines: Vec<&str> = log.lines().collect();
            let end = lines.get(lines.len().saturating_sub(15)..).unwrap_or_default();
            text += &format!("last lines of {unit} on {node}:\n  {}\n", end.join("\n  "));
        }
        text
    }

    /// Writes an object to every node or to the API server, if it is not there already.
    pub fn put(&mut self, object: Value) -> Result<()> {
        let file = manifests::file_name(&object);
        if self.objects.get(&file) == Some(&object) {
            return Ok(());
        }
        if self.spec.api_server.is_some() {
            self.apply(&object)?;
            self.objects.insert(file, object);
            return Ok(());
        }
        for name in self.node_names() {
            if let Some(host) = self.hosts.get(&name) {
                host.write(&format!("{MANIFESTS}/{file}"), &serde_json::to_vec_pretty(&object)?)?;
            }
        }
        self.objects.insert(file, object);
        Ok(())
    }

    /// Deletes an object (known by kind, namespace and name) from every node or from the API server.
    pub fn delete(&mut self, object: &Value) -> Result<()> {
        let file = manifests::file_name(object);
        self.objects.remove(&file);
        if self.spec.api_server.is_some() {
            return self.cluster()?.client().delete(object);
        }
        for host in self.node_names().iter().filter_map(|name| self.hosts.get(name)) {
            host.remove(&format!("{MANIFESTS}/{file}"))?;
        }
        Ok(())
    }

    /// The objects of some kinds, as written.
    pub fn objects(&self, of: impl Fn(&str) -> bool) -> Vec<Value> {
        let all = self.objects.values();
        all.filter(|object| of(object["kind"].as_str().unwrap_or_default())).cloned().collect()
    }

    /// Waits until every agent has carried out what is written now.
    pub fn enforced(&self) -> Result<()> {
        let mut synced: Vec<(Agent, Synced)> = Vec::new();
        for name in self.node_names() {
            if self.hosts.contains_key(&name) && !self.is_guest(&name) {
                let agent = self.agent(&name)?;
                let at = agent.sync().with_context(|| self.logs(&name))?;
                synced.push((agent, at));
            }
        }
        for (agent, at) in synced {
            agent.reached(at, PATIENCE)?;
        }
        Ok(())
    }

    /// Ends a host as a power cut would.
    pub fn kill_host(&mut self, name: &str) -> Result<()> {
        self.carrier.remove(name);
        self.server.close(&format!("host {name}"))?;
        let gone: Vec<_> =
            self.pods.iter().filter(|(_, pod)| pod.spec.node == name).map(|(key, _)| key.clone()).collect();
        for key in gone {
            self.pods.remove(&key);
            self.server.close(&format!("{}/{}", key.0, key.1))?;
        }
        self.hosts.get_mut(name).with_context(|| format!("no host {name}"))?.kill();
        self.routers.remove(name);
        Ok(())
    }

    /// Boots a killed host: its disk is as it was, its pods are made anew (as a kubelet would).
    pub fn boot_host(&mut self, name: &str) -> Result<()> {
        let host = self.host(name)?.reboot()?;
        if !self.spec.underlay.nat.iter().any(|nat| nat.host == name) {
            self.wire.plug(name, &host, "eth0")?;
        }
        self.hosts.insert(name.into(), host);
        self.address_host(name)?;
        if name == API_SERVER {
            return self.cluster()?.resume();
        }
        self.start_node(name)?;
        self.settle_node(name, PATIENCE)?;
        let pods: Vec<(spec::Pod, PodStatus)> = self
            .spec
            .pods
            .iter()
            .filter(|pod| pod.node == name)
            .map(|pod| (pod.clone(), PodStatus::default()))
            .collect();
        // The kubelet takes down the sandboxes that the boot ended, then makes new ones.
        for (pod, _) in pods.iter().filter(|(pod, _)| !pod.host_network) {
            crate::pods::cni(self.host(name)?, &self.bins, "DEL", pod)?;
        }
        self.add_pods(&pods)
    }

    /// A host.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.get(name).with_context(|| format!("no host {name}"))
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Result<Agent> {
        Ok(Agent::of(self.host(node)?))
    }

    /// A pod.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<&Pod> {
        let key = (namespace.to_string(), name.to_string());
        self.pods.get(&key).with_context(|| format!("no pod {namespace}/{name}"))
    }

    /// All pods that run.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// The wire.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The wire, to change its conditions.
    pub fn wire_mut(&mut self) -> &mut Wire {
        &mut self.wire
    }

    /// The carrier of announcements.
    pub fn carrier(&self) -> &Carrier {
        &self.carrier
    }

    /// The lab file.
    pub fn spec(&self) -> &spec::Lab {
        &self.spec
    }

    /// The programs.
    pub fn bins(&self) -> &Bins {
        &self.bins
    }

    /// Names of the nodes.
    pub fn node_names(&self) -> Vec<String> {
        self.spec.nodes.iter().map(|node| node.name.clone()).collect()
    }

    fn is_guest(&self, name: &str) -> bool {
        self.spec.nodes.iter().any(|node| node.name == name && node.datapath == spec::Datapath::Guest)
    }

    /// Names of all hosts.
    pub fn host_names(&self) -> Vec<String> {
        let externals = self.spec.externals.iter().map(|external| external.name.clone());
        let server = self.spec.api_server.iter().map(|_| API_SERVER.to_owned());
        self.node_names().into_iter().chain(externals).chain(server).collect()
    }

    /// A host's own addresses.
    pub fn ips(&self, name: &str) -> Result<Vec<IpAddr>> {
        let nodes = self.spec.nodes.iter().map(|node| (node.name.as_str(), &node.ips));
        let externals = self.spec.externals.iter().map(|external| (external.name.as_str(), &external.ips));
        let server = self.spec.api_server.iter().map(|server| (API_SERVER, &server.ips));
        let mut all = nodes.chain(externals).chain(server);
        all.find(|(known, _)| *known == name)
            .map(|(_, ips)| ips.clone())
            .with_context(|| format!("no host {name}"))
    }

    /// What a host finds on the wire besides itself.
    pub fn underlay_ips_but(&self, name: &str) -> Vec<IpAddr> {
        let mut ips = Vec::new();
        for other in self.host_names().iter().filter(|other| *other != name) {
            match self.spec.underlay.nat.iter().find(|nat| nat.host == *other) {
                Some(nat) => ips.extend(&nat.public),
                None => ips.extend(self.ips(other).unwrap_or_default()),
            }
        }
        ips
    }

    /// Inodes of all network namespaces of the lab.
    pub fn namespaces(&self) -> Result<Vec<u64>> {
        let hosts = self.hosts.values().chain(self.routers.values().map(|router| &router.host));
        let mut all: Vec<u64> = hosts.map(|host| host.netns().inode()).collect::<Result<_>>()?;
        all.push(self.wire.netns().inode()?);
        for pod in self.pods.values() {
            all.push(pod.netns.inode()?);
        }
        Ok(all)
    }

    /// Ends pods and hosts and leaves the wire, for a capture to see the end of them.
    pub fn end_hosts(&mut self) {
        self.pods.clear();
        self.hosts.clear();
        self.routers.clear();
    }
}

/// The unit of a device: `mesh-datapath` for the first, as ever, and `mesh-datapath@margay1` for the second.
pub fn datapath_unit(device: &str) -> String {
    match device {
        DEVICE => "mesh-datapath".to_owned(),
        other => format!("mesh-datapath@{other}"),
    }
}

fn unsettled(status: &Status) -> String {
    let reconcilers: Vec<String> = status
        .reconcilers
        .iter()
        .filter(|r| r.state != "done")
        .map(|r| format!("{} is {} {}", r.name, r.state, r.error.as_deref().unwrap_or_default()))
        .collect();
    let issues: Vec<String> = status
        .issues
        .iter()
        .map(|issue| format!("{} {}: {}", issue.object, issue.field, issue.message))
        .collect();
    format!(
        "{:?}, devices {:?}, {} peers; {}; issues: {}",
        status.generation,
        status.devices.iter().map(|device| &device.state).collect::<Vec<_>>(),
        status.peers.len(),
        reconcilers.join("; "),
        issues.join("; ")
    )
}

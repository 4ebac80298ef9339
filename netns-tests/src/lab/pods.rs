//! The pods of a running lab, as scheduler, runtime and kubelet would make them.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};

use super::Lab;
use crate::manifests::{self, PodStatus};
use crate::pods::{self, Pod};
use crate::spec;
use crate::wire::host_prefix;

impl Lab {
    /// Makes all the pods of the lab file.
    pub fn start_pods(&mut self) -> Result<()> {
        let pods: Vec<(spec::Pod, PodStatus)> =
            self.spec.pods.iter().map(|pod| (pod.clone(), PodStatus::default())).collect();
        self.add_pods(&pods)
    }

    /// Makes pods: objects first (the scheduler's), then CNI ADD on each node, then their status (the kubelet's),
    /// then the listeners. A host-network pod has its node's addresses.
    pub fn add_pods(&mut self, list: &[(spec::Pod, PodStatus)]) -> Result<()> {
        for (pod, status) in list {
            self.put(manifests::pod(pod, &PodStatus { ips: Vec::new(), ..status.clone() }))?;
        }
        self.enforced()?;
        let added: Vec<Vec<Result<Pod>>> = std::thread::scope(|scope| {
            let this = &*self;
            let threads: Vec<_> = self
                .node_names()
                .into_iter()
                .map(|node| {
                    let of_node = list.iter().filter(move |(pod, _)| pod.node == node);
                    scope.spawn(move || of_node.map(|(pod, _)| this.attach(pod)).collect())
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        let mut failed = None;
        for pod in added.into_iter().flatten() {
            let pod = match pod {
                Ok(pod) => pod,
                Err(error) => {
                    failed.get_or_insert(error);
                    continue;
                }
            };
            // Known from here on even if another failed, so that it can be removed.
            self.pods.insert((pod.spec.namespace.clone(), pod.spec.name.clone()), pod.clone());
            let status = list.iter().find(|(spec, _)| *spec == pod.spec).map(|(_, status)| status.clone());
            let status = PodStatus { ips: pod.ips.clone(), ..status.unwrap_or_default() };
            self.put(manifests::pod(&pod.spec, &status))?;
            self.listen(&pod)?;
            self.route_externals(&pod)?;
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.enforced()
    }

    fn attach(&self, pod: &spec::Pod) -> Result<Pod> {
        let host = self.host(&pod.node)?;
        if pod.host_network {
            return Ok(Pod { spec: pod.clone(), netns: host.netns().clone(), ips: self.ips(&pod.node)? });
        }
        pods::add(host, &self.bins, pod).with_context(|| self.logs(&pod.node))
    }

    /// Externals reach a pod through its node, in clear: they are no part of the mesh.
    fn route_externals(&self, pod: &Pod) -> Result<()> {
        let nodes = self.ips(&pod.spec.node)?;
        let mut lines = Vec::new();
        for ip in pod.ips.iter().filter(|_| !pod.spec.host_network) {
            if let Some(via) = nodes.iter().find(|via| via.is_ipv4() == ip.is_ipv4()) {
                lines.push(format!("route replace {} via {via} dev eth0 onlink", host_prefix(*ip)));
            }
        }
        for external in &self.spec.externals {
            self.host(&external.name)?.netns().ip(&lines)?;
        }
        Ok(())
    }

    fn listen(&self, pod: &Pod) -> Result<()> {
        let name = format!("{}/{}", pod.spec.namespace, pod.spec.name);
        for port in &pod.spec.ports {
            for ip in &pod.ips {
                if pod.spec.host_network {
                    self.listen_on_host(&pod.spec.node, *ip, port.port, port.protocol)?;
                } else {
                    self.server.listen(&pod.netns, &name, &name, *ip, port.port, port.protocol)?;
                }
            }
        }
        Ok(())
    }

    /// Lets a host (node or external) listen at one of its addresses; it answers with its name.
    pub fn listen_on_host(&self, host: &str, ip: IpAddr, port: u16, protocol: spec::Protocol) -> Result<()> {
        self.server.listen(self.host(host)?.netns(), &format!("host {host}"), host, ip, port, protocol)
    }

    /// Takes a pod away: listeners, CNI DEL, namespace, object.
    pub fn remove_pod(&mut self, namespace: &str, name: &str) -> Result<()> {
        let key = (namespace.to_string(), name.to_string());
        let Some(pod) = self.pods.remove(&key) else { bail!("no pod {namespace}/{name}") };
        if !pod.spec.host_network {
            self.server.close(&format!("{namespace}/{name}"))?;
            pods::del(self.host(&pod.spec.node)?, &self.bins, &pod.spec)?;
        }
        self.delete(&manifests::pod(&pod.spec, &PodStatus::default()))
    }

    /// A pod's object with another status or other labels; it listens on ports that it lists now.
    pub fn update_pod(&mut self, spec: &spec::Pod, status: &PodStatus) -> Result<()> {
        let key = (spec.namespace.clone(), spec.name.clone());
        let mut pod = self.pod(&key.0, &key.1)?.clone();
        pod.spec = spec.clone();
        let status = PodStatus { ips: pod.ips.clone(), ..status.clone() };
        self.put(manifests::pod(spec, &status))?;
        self.listen(&pod)?;
        self.pods.insert(key, pod);
        Ok(())
    }
}

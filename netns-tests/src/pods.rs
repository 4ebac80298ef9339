//! A pod: a network namespace on a host, networked by the real CNI plugin as a container runtime would.

use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::bins::Bins;
use crate::host::{Host, checked};
use crate::netns::Netns;
use crate::spec;

/// The network configuration of every host, also at /etc/cni/net.d/10-margay.conflist for stock tools.
pub fn conflist() -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "margay",
        "plugins": [{"type": "mesh-cni", "capabilities": {"ips": true}}],
    })
}

/// A pod with a network.
#[derive(Debug, Clone)]
pub struct Pod {
    /// As the lab file says.
    pub spec: spec::Pod,
    /// Its network namespace: its own, or its node's.
    pub netns: Netns,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
}

/// Name of a pod's network namespace under its host's /run/netns, and its container id.
pub fn netns_name(namespace: &str, name: &str) -> String {
    format!("{namespace}_{name}")
}

/// Makes the namespace and runs CNI ADD; the addresses it got.
pub fn add(host: &Host, bins: &Bins, pod: &spec::Pod) -> Result<Pod> {
    let id = netns_name(&pod.namespace, &pod.name);
    host.run(&["ip", "netns", "add", &id])?;
    let attached = (|| {
        let result = cni(host, bins, "ADD", pod)?;
        let result: Value =
            serde_json::from_str(&result).with_context(|| format!("CNI ADD said {result}"))?;
        let mut ips = Vec::new();
        for entry in result["ips"].as_array().into_iter().flatten() {
            let address = entry["address"].as_str().unwrap_or_default();
            let net: ipnet::IpNet =
                address.parse().with_context(|| format!("CNI ADD's address {address}"))?;
            ips.push(net.addr());
        }
        if ips.is_empty() {
            bail!("CNI ADD gave no address: {result}");
        }
        if !pod.ips.is_empty() && pod.ips.iter().any(|ip| !ips.contains(ip)) {
            bail!("CNI ADD gave {ips:?} instead of {:?}", pod.ips);
        }
        let netns = Netns::open(&host.path(&format!("/run/netns/{id}")))?;
        Ok(Pod { spec: pod.clone(), netns, ips })
    })();
    if attached.is_err() {
        host.run(&["ip", "netns", "del", &id]).ok();
    }
    attached.with_context(|| format!("pod {}/{}", pod.namespace, pod.name))
}

/// Runs CNI DEL and removes the namespace.
pub fn del(host: &Host, bins: &Bins, pod: &spec::Pod) -> Result<()> {
    cni(host, bins, "DEL", pod).with_context(|| format!("pod {}/{}", pod.namespace, pod.name))?;
    host.run(&["ip", "netns", "del", &netns_name(&pod.namespace, &pod.name)]).map(drop)
}

/// Calls mesh-cni in the host as a runtime does: environment and configuration on standard input.
pub fn cni(host: &Host, bins: &Bins, command: &str, pod: &spec::Pod) -> Result<String> {
    let id = netns_name(&pod.namespace, &pod.name);
    let plugin = bins.program("mesh-cni")?;
    let mut config = conflist()["plugins"][0].clone();
    config["cniVersion"] = json!("1.1.0");
    config["name"] = json!("margay");
    if !pod.ips.is_empty() {
        let ips: Vec<String> = pod.ips.iter().map(|ip| crate::wire::host_prefix(*ip)).collect();
        config["runtimeConfig"] = json!({ "ips": ips });
    }
    let arguments = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={id}",
        pod.namespace, pod.name
    );
    let mut child = host
        .command(&[plugin.to_str().context("path of mesh-cni")?])
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &id)
        .env("CNI_NETNS", Path::new("/run/netns").join(&id))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("run mesh-cni")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(config.to_string().as_bytes()).context("write the network configuration")?;
    }
    let output = child.wait_with_output().context("wait for mesh-cni")?;
    checked(&format!("{}: CNI {command} {id}", host.name()), output)
}

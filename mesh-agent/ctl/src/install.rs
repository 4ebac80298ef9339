//! `meshctl install`: the manifests of an overlay, to the cluster that kubectl knows or to standard output.
//!
//! They are rendered when the project is built, so that neither a checkout nor kustomize is needed here.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

/// The image in the rendered manifests.
const IMAGE: &str = concat!("margay:", env!("CARGO_PKG_VERSION"));
const CRD: &str = "crd/meshconfigurations.margay.io";

/// `meshctl install …`
#[derive(Debug, Clone, Args)]
pub(crate) struct Install {
    /// What kind of cluster it is
    #[arg(long, value_enum, default_value = "kubeadm")]
    overlay: Overlay,
    /// The image with Margay's programs, where the cluster's nodes can pull it
    #[arg(long, value_name = "IMAGE", default_value = IMAGE, value_parser = parse_image)]
    image: String,
    /// A MeshConfiguration of yours, in place of the overlay's sample
    #[arg(long, value_name = "FILE")]
    mesh: Option<PathBuf>,
    /// Print the manifests and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// The kinds of clusters, each a directory below manifests/overlays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Overlay {
    /// Margay is the CNI, as kubeadm leaves room for one
    Kubeadm,
    /// Margay is the CNI, in k3s' directories
    K3s,
    /// Chained behind flannel: encryption only
    Flannel,
    /// Amazon EKS with the VPC CNI: encryption only
    Eks,
    /// Azure AKS: encryption only
    Aks,
    /// Google GKE: encryption only
    Gke,
}

macro_rules! embedded {
    ($name:literal) => {
        (
            include_str!(concat!("../../../manifests/rendered/", $name, ".yaml")),
            include_str!(concat!("../../../manifests/overlays/", $name, "/mesh.yaml")),
        )
    };
}

impl Overlay {
    /// What kustomize makes of it, and its sample MeshConfiguration.
    fn manifests(self) -> (&'static str, &'static str) {
        match self {
            Self::Kubeadm => embedded!("kubeadm"),
            Self::K3s => embedded!("k3s"),
            Self::Flannel => embedded!("flannel"),
            Self::Eks => embedded!("eks"),
            Self::Aks => embedded!("aks"),
            Self::Gke => embedded!("gke"),
        }
    }
}

/// It becomes a line of YAML.
fn parse_image(text: &str) -> Result<String, String> {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    match text.chars().all(known) && text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        true => Ok(text.to_owned()),
        false => Err("is not the name of an image".to_owned()),
    }
}

/// Prints or applies.
pub(crate) fn run(install: &Install) -> anyhow::Result<()> {
    let (rendered, sample) = install.overlay.manifests();
    let rendered = with_image(rendered, &install.image);
    let mesh = match &install.mesh {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("{}", file.display()))?,
        None => sample.to_owned(),
    };
    if install.dry_run {
        let text = format!("{rendered}---\n{mesh}");
        return io::stdout().lock().write_all(text.as_bytes()).context("standard output");
    }
    let kubectl = Path::new("kubectl");
    call(kubectl, &["apply", "--server-side", "-f", "-"], Some(&rendered))?;
    // The API server must know the kind before it takes one.
    call(kubectl, &["wait", "--for=condition=Established", CRD, "--timeout=60s"], None)?;
    let present = ["get", "meshconfigurations.margay.io", "--ignore-not-found", "-o", "name"];
    if install.mesh.is_none() && !answer(kubectl, &present)?.trim().is_empty() {
        println!("the MeshConfiguration that is there stays as it is");
        return Ok(());
    }
    call(kubectl, &["apply", "--server-side", "-f", "-"], Some(&mesh))
}

fn with_image(rendered: &str, image: &str) -> String {
    rendered.replace(&format!("image: {IMAGE}\n"), &format!("image: {image}\n"))
}

fn started(kubectl: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!(
            "{}: is not on this machine's PATH; `meshctl install --dry-run` prints what it would apply",
            kubectl.display()
        ),
        _ => format!("{}: {error}", kubectl.display()),
    }
}

/// Runs kubectl, which prints for itself.
fn call(kubectl: &Path, arguments: &[&str], input: Option<&str>) -> anyhow::Result<()> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = Command::new(kubectl)
        .args(arguments)
        .stdin(stdin)
        .spawn()
        .map_err(|error| anyhow::anyhow!(started(kubectl, &error)))?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // If it ends before it has read all of it, its exit code says more than this.
        let _ = stdin.write_all(input.as_bytes());
    }
    let status = child.wait().context("kubectl")?;
    if !status.success() {
        bail!("kubectl {}: {status}", arguments.join(" "));
    }
    Ok(())
}

/// Runs kubectl for what it prints.
fn answer(kubectl: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(kubectl).args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| anyhow::anyhow!(started(kubectl, &error)))?;
    if !output.status.success() {
        bail!("kubectl {}: {}", arguments.join(" "), output.status);
    }
    String::from_utf8(output.stdout).context("kubectl's answer")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_image_is_changed_wherever_there_is_one() {
        for overlay in Overlay::value_variants() {
            let (rendered, mesh) = overlay.manifests();
            let changed = with_image(rendered, "registry.test:5000/m/margay@sha256:00");
            let images = |text: &str| text.lines().filter(|line| line.trim().starts_with("image: ")).count();
            assert!(images(rendered) >= 3, "{overlay:?}");
            assert_eq!(
                changed.matches("image: registry.test:5000/m/margay@sha256:00\n").count(),
                images(rendered)
            );
            assert!(mesh.contains("kind: MeshConfiguration"), "{overlay:?}");
        }
    }

    #[test]
    fn an_image_cannot_bring_more_yaml_in() {
        for bad in ["", "a\nb", "a b", "-a", "a: b{", "a#"] {
            assert!(parse_image(bad).is_err(), "{bad:?}");
        }
        assert!(parse_image("localhost:5000/margay:1@sha256:ab").is_ok());
    }
}

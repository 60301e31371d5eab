//! Metrics as Prometheus reads them: its own text format, and OpenMetrics.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue as _, LabelSetEncoder, prometheus_text,
    text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::families::{Family, Kind, Label, Value};

/// One of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus's text format, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    /// What an `Accept` header asks for.
    pub fn wanted(accept: &str) -> Format {
        match accept.contains("application/openmetrics-text") {
            true => Format::OpenMetrics,
            false => Format::Text,
        }
    }

    /// The `Content-Type`.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Writes all families.
///
/// # Errors
/// Of `out`.
pub fn write(families: Vec<Family>, format: Format, out: &mut impl fmt::Write) -> fmt::Result {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Families(families)));
    match format {
        Format::Text => prometheus_text::encode(out, &registry),
        Format::OpenMetrics => text::encode(out, &registry),
    }
}

#[derive(Debug)]
struct Families(Vec<Family>);

struct Labels<'a>(&'a [Label]);

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        for (key, value) in self.0 {
            let mut label = encoder.encode_label();
            let mut name = label.encode_label_key()?;
            fmt::Write::write_str(&mut name, key)?;
            let mut text = name.encode_label_value()?;
            (&**value).encode(&mut text)?;
            text.finish()?;
        }
        Ok(())
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in self.0.iter().filter(|family| !family.points.is_empty()) {
            let name = family.name.replace('.', "_");
            let kind = match family.kind {
                Kind::Gauge => MetricType::Gauge,
                Kind::Counter => MetricType::Counter,
                Kind::Histogram => MetricType::Histogram,
            };
            let unit = match family.unit {
                "s" => Some(Unit::Seconds),
                "By" => Some(Unit::Bytes),
                // Dimensionless.
                "1" => Some(Unit::Other("ratio".to_owned())),
                _ => None,
            };
            let mut metric = encoder.encode_descriptor(&name, family.help, unit.as_ref(), kind)?;
            for point in &family.points {
                let labels = Labels(&point.labels);
                let mut metric = metric.encode_family(&labels)?;
                match &point.value {
                    Value::Int(value) if family.kind == Kind::Counter => {
                        metric.encode_counter::<Labels<'_>, _, u64>(&value.unsigned_abs(), None)?;
                    }
                    Value::Float(value) if family.kind == Kind::Counter => {
                        metric.encode_counter::<Labels<'_>, _, f64>(value, None)?;
                    }
                    Value::Int(value) => metric.encode_gauge(value)?,
                    Value::Float(value) => metric.encode_gauge(value)?,
                    Value::Histogram {
                        sum,
                        count,
                        buckets,
                    } => metric.encode_histogram::<Labels<'_>>(*sum, *count, buckets, None)?,
                }
            }
        }
        Ok(())
    }
}

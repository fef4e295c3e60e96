'use strict';
'require form';
'require uci';
'require view';

/* The settings of /etc/config/netproxy, and a link to the status page. */
return view.extend({
	load: function () {
		return uci.load('netproxy');
	},

	render: function () {
		var map = new form.Map('netproxy', _('NetProxy'),
			_('One port for SOCKS and HTTP proxy clients, over TCP and UDP.'));
		var section = map.section(form.NamedSection, 'main', 'netproxy', _('Proxy'));
		var option = section.option(form.Flag, 'enabled', _('Enabled'));
		option.rmempty = false;
		option = section.option(form.DynamicList, 'listen', _('Listeners'),
			_('Such as sps://192.168.1.1:1080 or dns://192.168.1.1:5353'));
		option.depends('config', '');
		option = section.option(form.DynamicList, 'clients', _('Clients'),
			_('Networks that may use the proxy'));
		option.datatype = 'cidr';
		option.depends('config', '');
		option = section.option(form.DynamicList, 'upstream', _('Upstreams'),
			_('A chain of proxies, first hop first; none: direct connections'));
		option.password = true;
		option.depends('config', '');
		section.option(form.Value, 'config', _('Configuration file'),
			_('Replaces the settings above; needs python3-yaml'));
		option = section.option(form.DummyValue, 'status', _('Status page'));
		option.cfgvalue = function (id) {
			var url = uci.get('netproxy', id, 'status');
			return url ? E('a', {'href': url, 'target': '_blank', 'rel': 'noopener'}, url) : _('not set');
		};
		return map.render();
	}
});

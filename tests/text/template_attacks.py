"""Chat templates that a hostile model file might bring, by what they are after."""

from __future__ import annotations

# Out of the sandbox: by attributes, gadgets of Jinja and its users, formats, other files. Each must fail.
ESCAPES = """
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ ''.__class__.__base__.__subclasses__()[137].__init__.__globals__['sys'].modules['os'].system('id') }}
{{ [].__class__.__base__.__subclasses__() }}
{{ {}.__class__.__mro__[-1].__subclasses__() }}
{{ ().__class__.__bases__[0].__subclasses__() }}
{{ messages.__class__.__init__.__globals__ }}
{{ messages[0].__class__.__mro__[1].__subclasses__() }}
{{ (1).__class__.__base__.__subclasses__() }}
{{ true.__class__.__bases__[0].__subclasses__() }}
{{ range.__class__.__base__.__subclasses__() }}
{{ dict.__base__.__subclasses__() }}
{{ dict.mro()[1].__subclasses__() }}
{{ dict.__mro__[1].__subclasses__() }}
{{ raise_exception.__globals__['sys'].modules['os'].popen('id').read() }}
{{ raise_exception.__code__.co_code }}
{{ raise_exception.__closure__[0] }}
{{ raise_exception.__builtins__['eval']('1') }}
{{ strftime_now.__globals__.sys.exit(1) }}
{{ strftime_now.__func__.__globals__.sys.exit(1) }}{{ strftime_now.__self__.now }}
{{ strftime_now.__globals__['__builtins__']['open']('{canary}', 'w').write('x') }}
{{ namespace.__init__.__globals__.os.popen('id').read() }}
{{ namespace()._Namespace__attrs.__class__.__mro__[1].__subclasses__() }}
{{ namespace().__class__.__init__.__globals__ }}
{{ lipsum.__globals__['os'].popen('id').read() }}
{{ lipsum.__globals__.os.system('touch {canary}') }}
{{ cycler.__init__.__globals__.os.popen('id').read() }}
{{ joiner.__init__.__globals__.os.popen('id').read() }}
{{ request.application.__globals__.__builtins__.__import__('os').popen('id').read() }}
{{ config.__class__.__init__.__globals__['os'].popen('id').read() }}
{{ config.from_pyfile('/etc/passwd') }}
{{ url_for.__globals__.os }}
{{ get_flashed_messages.__globals__.os }}
{{ g.pop.__globals__.__builtins__ }}
{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}
{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('id').read() }}
{{ self._TemplateReference__context.environment.from_string('x').render() }}
{{ self.__dict__._TemplateReference__context.eval_ctx.environment }}
{{ loop.__init__.__globals__.os }}
{% for x in [1] %}{{ loop.__class__.__init__.__globals__.os.system('id') }}{% endfor %}
{% for x in [1] %}{{ loop._iterator.__class__.__mro__[1].__subclasses__() }}{% endfor %}
{% macro m() %}{{ caller.__globals__.os }}{% endmacro %}{{ m() }}
{% macro m() %}{% endmacro %}{{ m._func.__globals__.os }}
{% macro m() %}{% endmacro %}{{ m._environment.globals.clear() }}
{% macro m() %}{% endmacro %}{{ m.__class__.__init__.__globals__ }}
{{ (messages | attr('__class__')).__mro__ }}
{{ (messages | attr('__cla' ~ 'ss__') | attr('__mro__'))[1] }}
{{ messages['__cla' + 'ss__']['__mro__'] }}
{{ ''['\\x5f\\x5fclass\\x5f\\x5f']['\\x5f\\x5fmro\\x5f\\x5f'] }}
{{ (''|attr(['_','_','c','l','a','s','s','_','_']|join)|attr('mro'))() }}
{{ (''|attr('%c%cclass%c%c'|format(95,95,95,95))).mro() }}
{{ ''|attr('__class__')|attr('__base__')|attr('__subclasses__')()|list|first }}
{{ ['']|map(attribute='__class__.__mro__')|list|first|first }}
{{ ['a']|groupby('__class__.__mro__.0') }}
{{ ['a']|sort(attribute='__class__.__mro__.0.x') }}
{{ [messages]|sum(attribute='__class__.__mro__.0') }}
{{ [messages]|selectattr('__class__.__mro__.0')|list|first|attr('append')(1) }}
{{ '{0.__class__.__mro__[1].__subclasses__}'.format('') }}
{{ '{0.__class__.__init__.__globals__[os]}'.format(messages) }}
{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}
{{ ('{0.__cla' ~ 'ss__.__mro__}').format(1) }}
{{ '{0.__class__.__mro__}'|attr('format')(1) }}
{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}
{{ ['{0.__class__.__mro__}']|map('attr', 'format')|first(1) }}
{{ '%(a)s'|format(**messages.__class__.__dict__) }}
{% set x = messages.append(1) %}
{% set x = messages.pop() %}
{% set x = messages.clear() %}
{% set x = messages.insert(0, {}) %}
{% set x = messages.sort() %}
{% set x = messages.reverse() %}
{% set x = messages.extend([1]) %}
{% set x = messages.remove(messages[0]) %}
{% set x = messages[0].update({'role': 'system'}) %}
{% set x = messages[0].setdefault('a', 1) %}
{% set x = messages[0].pop('role') %}
{% set x = messages[0].popitem() %}
{% set x = messages[0].clear() %}
{% set append = messages.append %}{{ append({}) }}
{{ messages | attr('append')({}) }}
{% do messages.append({}) %}
{% set messages[0].role = 'system' %}
{% set messages[0]['role'] = 'system' %}
{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}
{% include '/etc/passwd' %}
{% include ['{canary}', '/etc/passwd'] %}
{% import '/etc/passwd' as p %}
{% from 'os' import system %}
{% extends '/etc/passwd' %}
{% include 'x' ignore missing without context %}{{ raise_exception('nothing was included') }}
{{ import('os') }}
{{ __import__('os').system('id') }}
{{ eval('1') }}
{{ exec('1') }}
{{ open('{canary}', 'w').write('x') }}
{{ ().__reduce_ex__(2) }}
{{ (messages | map('string') | list).__reduce__() }}
{{ messages.__getattribute__('append')(1) }}
{{ messages.__setitem__(0, 1) }}
{{ messages.__iadd__([1]) }}
{{ ''.join.__self__.__class__.__mro__ }}
{{ ''.join.__call__.__class__.__mro__ }}
{{ (1.0).__class__.__mro__[1].__subclasses__() }}
{{ (messages | tojson).__class__.__mro__ }}
{{ range(1).__class__.__mro__[1].__subclasses__() }}
{{ (messages | batch(1)).gi_frame.f_globals }}
{{ (messages | batch(1)).gi_frame.f_builtins }}
{{ (messages | map('upper')).gi_code.co_consts }}
{{ (messages | select).__self__ }}{{ (messages | select).gi_frame.f_back.f_globals }}
{{ messages | tojson(**{'default': raise_exception}) }}
{{ 1 | tojson(cls=dict) }}
{{ tojson.__globals__ }}{{ tojson() }}
{{ raise_exception('SECRET'.__class__.__mro__) }}
{{ undefined_thing.__class__.__init__.__globals__.os }}
{{ undefined_thing._fail_with_undefined_error() }}
{{ undefined_thing._undefined_exception.__mro__ }}
{% call(x) raise_exception('called') %}{% endcall %}
{% filter attr('__class__') %}x{% endfilter %}{{ raise_exception('filtered') }}
{% set x %}{{ ''.__class__.__mro__[1] }}{% endset %}
{% block b %}{{ self.b.__func__.__globals__ }}{% endblock %}
{% block b %}{{ super.__globals__ }}{{ super() }}{% endblock %}
{% with x = ''.__class__ %}{{ x.__mro__ }}{% endwith %}
{% generation %}{{ ''.__class__.__mro__[1] }}{% endgeneration %}
{% generation %}{{ caller.__globals__.os }}{% endgeneration %}
{% autoescape true %}{{ ''.__class__.__mro__ }}{% endautoescape %}
""".strip().splitlines()

# After the machine: time, memory, stack, output. Each must fail, soon and without taking much.
EXHAUSTION = """
{% for i in range(10**9) %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}
{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}
{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}
{% for i in [[[1]]] recursive %}{{ loop([[[1]]]) }}{% endfor %}
{{ 'a' * 10**10 }}
{{ 'a' * 10**9 }}
{{ ['a'] * 10**9 }}
{{ ('a' * 10**8) | upper | lower | upper }}{{ ('b' * 10**8) | list }}
{{ 2 ** (10**10) }}
{{ 10 ** (10 ** 8) % 7 }}
{{ (9 ** (9 ** 9)) is even }}
{{ (3 ** (9 ** 9)) | string | length }}
{{ '%1000000000d' % 1 }}
{{ '%*d' % (1000000000, 1) }}
{{ '%.1000000000f' % 1 }}
{{ '%1000000000d' | format(1) }}
{{ '{:>1000000000}'.format(1) }}
{{ '{:{}}'.format(1, 1000000000) }}
{{ '{:.1000000000f}'.format(1.5) }}
{{ 'x' | center(10**9) }}
{{ 'x'.center(10**9) }}
{{ 'x'.ljust(10**9) }}
{{ 'x'.zfill(10**9) }}
{{ ('\\t' * 1000000).expandtabs(100000) }}
{{ ('x\\n' * 1000000) | indent(100000) }}
{{ 'x' | indent(10**9, true) }}
{{ (range(100000) | join('x' * 100000)) }}
{{ ('x' * 100000).replace('x', 'x' * 100000) }}
{{ ('x' * 100000).join(range(100000) | map('string')) }}
{{ 'a b' | wordwrap(1) }}{{ ('a ' * 10000000) | wordwrap(1) }}{{ 'x' * 9999999 }}
{{ range(100000) | map('string') | list | tojson(indent=100000) }}
{{ [1] | tojson(indent=1000000000) }}
{{ range(99999) | batch(10**9, 'x') | list }}
{{ range(99999) | slice(10**9) | list }}
{{ 'x' | urlize(10**9) }}{{ 'x' * 9999999 }}
{{ (1).__add__(1) }}{{ 1 | round(10**9) }}{{ 'x' * 9999999 }}
{{ 'x'.encode('utf-8').hex() * 10**9 }}
{{ strftime_now('%Y' * 10**7) }}
{{ strftime_now('%1000000000Y') }}{{ 'x' * 9999999 }}
{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}
{% set ns = namespace(s=['x']) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s=3) %}{% for i in range(99) %}{% set ns.s = ns.s * ns.s %}{% endfor %}
{% set ns = namespace(s=[]) %}{% for i in range(9999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s | tojson }}
{% set ns = namespace(s=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}
{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}
{{ ('a' * 50000) in ('a' * 10**8 ~ 'b') }}{{ 'x' * 9999999 }}
{{ range(99999) | sort(attribute='x.' * 99999) | list }}{{ 'x' * 9999999 }}
{{ (range(99999) | list) | unique | list | length }}{{ 'x' * 9999999 }}
{{ ('<' * 10**7) | striptags }}{{ 'x' * 9999999 }}
{{ 'x' * 4194305 }}
{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}
""".strip().splitlines()

# Built rather than written: sources that strain the compiler.
COMPILER = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
    "blocks": "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
    "loops": "{% for a in [1] %}" * 300 + "{% endfor %}" * 300,
    "attributes": "{{ x" + ".a" * 100_000 + " }}",
    "additions": "{{ 1" + " + 1" * 100_000 + " }}",
    "negations": "{{ " + "not " * 100_000 + "1 }}",
    "folded power": "{{ 7 ** 7 ** 7 ** 7 }}",
    "folded product": "{{ 'a' * 10 ** 10 }}",
    "folded format": "{{ '%1000000000d' % 1 }}",
    "filters": "{{ 'x' " + "| upper " * 20_000 + " }}",
    "unclosed": "{% for x in y %}" * 100_000,
}

# Odd, but nothing to get: these may render, to something that says nothing of the machine.
HARMLESS = """
{{ ''.__class__ }}
{{ messages | attr('__class__') }}
{{ messages[0]['__class__'] }}
{{ lipsum }}
{{ lipsum() if lipsum is defined }}
{{ request }}{{ config }}{{ g }}{{ url_for }}
{{ ''|attr('format') is undefined }}
{{ ['']|map('attr', '__class__')|map('attr', '__mro__')|list|first|first }}
{{ dict }}{{ range }}
{{ '{0.__class__}'.format(1) }}
{{ '%s' % raise_exception.__name__ }}
{{ loop }}{{ caller }}{{ varargs }}{{ kwargs }}
{% set raise_exception = 1 %}{{ raise_exception }}
{% set range = 1 %}{{ range }}
{% set ns = namespace() %}{% set ns.os = 1 %}{{ ns.os }}
""".strip().splitlines()
